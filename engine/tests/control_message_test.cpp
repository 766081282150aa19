// SPDX-License-Identifier: Apache-2.0
// Tests of valid control messages, and of bytes that are none.
#include "runtime/control_message.hpp"

#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "test.hpp"

namespace dtrain {
namespace {

using namespace test;
using Kind = ControlMessage::Kind;

const Test refused("control: a message that names a missing rank, or has no end, is refused", Runs::alone, [] {
  const auto is_taken = [](const ControlMessage& message, std::size_t num_bytes = sizeof(ControlMessage)) {
    std::vector<std::byte> bytes(2 * sizeof(message));
    std::memcpy(bytes.data(), &message, sizeof(message));
    const auto size_of_group = [](std::uint64_t id) { return id == 7 ? 2 : 0; };
    return parse_control(std::span(bytes).first(num_bytes), 4, size_of_group).has_value();
  };
  const ControlMessage of_group{.kind = Kind::answer, .group = 7, .member = 1};
  const ControlMessage seen{.kind = Kind::seen, .member = 3, .snapshot = {3, State::silent, {}, {}}};
  expect(is_taken(of_group) && is_taken(seen), "whole ones");
  expect(!is_taken(of_group, 0) && !is_taken(of_group, sizeof(of_group) - 1) &&
             !is_taken(of_group, sizeof(of_group) + 1),
         "another length");
  const auto change = [&](ControlMessage message, const std::function<void(ControlMessage&)>& how) {
    how(message);
    return is_taken(message);
  };
  expect(!change(of_group, [](auto& one) { one.kind = static_cast<Kind>(7); }), "the kind");
  expect(!change(of_group, [](auto& one) { one.group = 8; }), "a group that this rank is not in");
  for (const int member : {-1, 2, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
    expect(!change(of_group, [=](auto& one) { one.member = member; }), "member " + std::to_string(member));
  }
  expect(!change(seen, [](auto& one) { one.member = 4; }), "no such rank says it");
  for (const std::int64_t rank : {std::int64_t{-1}, std::int64_t{4}, std::int64_t{1} << 32}) {
    expect(!change(seen, [=](auto& one) { one.snapshot.rank = rank; }), "seen: rank " + std::to_string(rank));
  }
  expect(!change(seen, [](auto& one) { one.snapshot.state = static_cast<State>(5); }), "seen: the state");
  expect(!change(of_group, [](auto& one) { one.reason.fill('x'); }), "a text without an end");
});

}  // namespace
}  // namespace dtrain
