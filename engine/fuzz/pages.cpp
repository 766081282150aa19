// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "collectives/local_group.hpp"
#include "fuzz/targets.hpp"
#include "runtime/status.hpp"

namespace dtrain::fuzz {
namespace {

std::shared_ptr<const Allocation> allocate(std::size_t num_bytes) {
  auto allocation = std::make_shared<Allocation>();
  for (int member = 0; member < 2; ++member) allocation->emplace_back(create_memory(num_bytes), num_bytes);
  return allocation;
}

// Overwrites `target` with the next bytes, and its rest with zeros; returns the bytes that are left.
std::span<const std::byte> fill(std::span<std::byte> target, std::span<const std::byte> bytes) {
  const std::size_t num_bytes = std::min(target.size(), bytes.size());
  std::ranges::fill(target, std::byte{});
  std::ranges::copy(bytes.first(num_bytes), target.begin());
  return bytes.subspan(num_bytes);
}

}  // namespace

void pages(std::span<const std::byte> bytes) {
  // The bytes are the other rank's call in a group, the rest of its memory there, and its status page.
  constexpr std::size_t header_bytes = 8192;  // at least the length of a group's header
  const auto call_bytes = bytes.first(std::min(bytes.size(), sizeof(Call)));
  bytes = bytes.subspan(call_bytes.size());
  alignas(StatusPage) static std::array<std::byte, sizeof(StatusPage)> page;
  static const auto blocks = allocate(LocalGroup::block_bytes());
  static const auto allocation = allocate(4096);
  static std::vector<Doorbell> bells(2);
  bytes = fill(page, bytes);
  fill((*blocks)[0].bytes().first(header_bytes), {});
  fill((*blocks)[1].bytes().first(header_bytes), bytes);

  const auto& status = *reinterpret_cast<const StatusPage*>(page.data());
  for (const State state : {State::running, State::stopped, State::dead, State::ended, State::silent}) {
    const std::vector<Snapshot> snapshots{{1, state, status.place.read(), status.wait.read()}};
    describe_stall(snapshots, std::vector<Origin>(2), "");
    describe_places(snapshots);
  }

  constexpr std::size_t num_bytes = 100;
  LocalGroup group(0, blocks, {&bells[0], &bells[1]});
  std::memcpy(const_cast<Call*>(&group.call_of(1, 0)), call_bytes.data(), call_bytes.size());
  group.add(allocation);
  Call call{.collective = Collective::all_reduce};
  group.locate((*allocation)[0].bytes().first(num_bytes), call);
  group.post(0, call);
  group.all_posted(0);
  group.last_seen(1).call.description();
  group.call_of(1, 0).description();
  group.call_of(1, 0).agrees_with(call);
  if (group.first_left(0) == 1 && group.reason_of(1).size() > 1000) std::abort();
  group.barrier(false);
  group.any_flag();
  try {
    const auto places = group.shared_buffers(0, num_bytes);
    for (std::size_t member = 0; member < places.size(); ++member) {
      const auto block = (*allocation)[member].bytes();
      if (places[member] < block.data() || places[member] + num_bytes > block.data() + block.size()) std::abort();
    }
  } catch (const std::runtime_error&) {
    // The rank's call names a place outside of its memory.
  }
}

}  // namespace dtrain::fuzz
