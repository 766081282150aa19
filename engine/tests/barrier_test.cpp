// SPDX-License-Identifier: Apache-2.0
#include "collectives/barrier.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "collectives/all_gather.hpp"
#include "collectives/parts.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test nobody_leaves("barrier: nobody leaves a barrier before all have called it", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    if (layout.group.rank() == layout.group.size() - 1) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const double own = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    finish(layout.engine, barrier(layout.group));
    const double left = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    std::vector<double> called(static_cast<std::size_t>(layout.group.size()));
    const auto places = even_parts(std::as_writable_bytes(std::span(called)), called.size());
    const auto gathered = layout.engine.submit(
        all_gather(layout.group, std::as_bytes(std::span(&own, 1)), places, DataType::float64));
    finish(layout.engine, gathered);
    expect(left >= std::ranges::max(called), layout.name);
  });
});

}  // namespace
}  // namespace dtrain
