// SPDX-License-Identifier: Apache-2.0
#include "ranks.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <random>

#include "at.hpp"

namespace dtrain::test {

std::shared_ptr<Group> Ranks::all() {
  std::vector<int> everyone(static_cast<std::size_t>(engine.size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  return engine.create_group(everyone);
}

void finish(Engine& engine, const std::shared_ptr<Operation>& operation) {
  if (!engine.wait(*operation, std::chrono::seconds(50))) throw std::runtime_error("an operation without end");
  operation->rethrow();
}

void finish(Engine& engine, PreparedCall prepared) { finish(engine, engine.submit(std::move(prepared))); }

void for_each_layout(const std::function<void(const Layout&)>& body) {
  const auto world = mpi::Communicator::duplicate(0);
  struct Case {
    int max_ranks_per_node;
    std::vector<std::vector<int>> groups;
    std::vector<int> numa_nodes = {};
  };
  std::vector<std::vector<Case>> cases(5);
  cases[1] = {{0, {{0}}}};
  cases[2] = {{0, {{0, 1}, {1, 0}}}, {1, {{0, 1}, {1}}}};
  cases[3] = {{0, {{0, 1, 2}, {2, 0}}},
              {1, {{0, 1, 2}}},
              {2, {{0, 1, 2}, {2, 1, 0}, {0, 2, 1}, {1, 2}}},
              {0, {{0, 1, 2}, {0, 2, 1}}, {0, 0, 1}}};
  cases[4] = {{0, {{0, 1, 2, 3}, {1, 3}}},
              {1, {{3, 2, 1, 0}}},
              {2, {{0, 1, 2, 3}, {0, 2, 1, 3}, {3, 0, 2}, {0, 1}}},
              {3, {{0, 1, 2, 3}, {3, 0, 1, 2}, {0, 3}}},
              {0, {{0, 1, 2, 3}, {0, 2, 1, 3}}, {0, 0, 1, 1}},
              {0, {{0, 1, 2, 3}}, {2, 0, 1, 1}},
              {3, {{0, 2, 1, 3}}, {0, 0, 1, 1}}};
  for (const Case& nodes : cases.at(static_cast<std::size_t>(world.size()))) {
    const int numa_node = nodes.numa_nodes.empty() ? 0 : at(nodes.numa_nodes, world.rank());
    Ranks ranks(nodes.max_ranks_per_node, numa_node);
    for (const std::vector<int>& members : nodes.groups) {
      if (std::ranges::find(members, ranks.engine.rank()) == members.end()) continue;
      const auto group = ranks.engine.create_group(members);
      std::string name = "group";
      for (const int member : members) name.append(" ").append(std::to_string(member));
      name.append(", nodes of ").append(std::to_string(nodes.max_ranks_per_node));
      if (!nodes.numa_nodes.empty()) name += ", NUMA nodes";
      for (const int number : nodes.numa_nodes) name.append(" ").append(std::to_string(number));
      try {
        body({ranks.engine, *group, nodes.numa_nodes, name});
      } catch (const std::exception& error) {
        throw std::runtime_error(name + ": " + error.what());
      }
    }
  }
}

static Bytes draw_contribution(int rank, DataType dtype, std::size_t count) {
  std::minstd_rand random(static_cast<unsigned>(rank + 1));
  std::uniform_real_distribution<double> uniform(-2, 2);
  Bytes bytes(count * element_bytes(dtype));
  const auto fill = [&](auto draw) {
    for (std::size_t i = 0; i < count; ++i) {
      const auto value = draw();
      std::memcpy(bytes.data() + i * sizeof(value), &value, sizeof(value));
    }
  };
  switch (dtype) {
    case DataType::float32: fill([&] { return static_cast<float>(uniform(random)); }); break;
    case DataType::float64: fill([&] { return uniform(random); }); break;
    case DataType::int8:
    case DataType::uint8: fill([&] { return static_cast<std::uint8_t>(random() >> 8); }); break;
    case DataType::int16: fill([&] { return static_cast<std::uint16_t>(random() >> 8); }); break;
    case DataType::boolean: fill([&] { return static_cast<std::uint8_t>(random() >> 8 & 1U); }); break;
    case DataType::bfloat16:  // patterns with magnitude below 0x4000: finite, and so are their sums
    case DataType::float16: fill([&] { return static_cast<std::uint16_t>(random() >> 8 & 0xbfffU); }); break;
    case DataType::int32: fill([&] { return static_cast<std::uint32_t>(random() << 3); }); break;
    case DataType::int64: fill([&] { return std::uint64_t{random()} << 31; }); break;
    default: break;  // such types are only moved
  }
  return bytes;
}

Bytes contribution(int rank, DataType dtype, std::size_t count) {
  static std::map<std::pair<int, DataType>, Bytes>
      longest;  // drawing takes long; a shorter contribution is the beginning of the longest
  const std::size_t num_bytes = count * element_bytes(dtype);
  Bytes& drawn = longest[{rank, dtype}];
  if (drawn.size() < num_bytes) drawn = draw_contribution(rank, dtype, count);
  return {drawn.begin(), drawn.begin() + static_cast<std::ptrdiff_t>(num_bytes)};
}

Bytes reduce_in_order(const std::vector<Bytes>& contributions, const Reduction& reduction) {
  Bytes result(contributions[0].size());
  std::vector<const std::byte*> sources;
  for (const Bytes& bytes : contributions) sources.push_back(bytes.data());
  std::byte* const place = result.data();
  reduce(sources, {&place, 1}, result.size() / element_bytes(reduction.dtype), reduction);
  return result;
}

// Rounds float32 values to `dtype` and back.
static Bytes through(DataType dtype, const Bytes& values) {
  Bytes narrowed(values.size() / 2);
  Bytes widened(values.size());
  narrow(values, narrowed.data(), dtype);
  widen(narrowed, widened.data(), dtype);
  return widened;
}

// Reduces the contributions of some ranks of a node over its domains.
static Bytes reduce_by_numa(const Layout& layout, const std::vector<int>& ranks,
                            const std::vector<Bytes>& contributions, Reduction reduction) {
  std::vector<int> numbers;
  std::vector<std::vector<Bytes>> domains;
  for (const int rank : ranks) {
    const int world_rank = at(layout.group.world_ranks(), rank);
    const int number = layout.numa_nodes.empty() ? 0 : at(layout.numa_nodes, world_rank);
    const auto place = std::ranges::find(numbers, number) - numbers.begin();
    if (place == static_cast<std::ptrdiff_t>(numbers.size())) {
      numbers.push_back(number);
      domains.emplace_back();
    }
    at(domains, place).push_back(at(contributions, rank));
  }
  if (domains.size() == 1) return reduce_in_order(domains[0], reduction);
  Reduction within = reduction;
  within.scale = 1.0;
  std::vector<Bytes> partials;
  for (const auto& domain : domains) partials.push_back(reduce_in_order(domain, within));
  return reduce_in_order(partials, reduction);
}

Bytes reduce_by_nodes(const Layout& layout, const std::vector<Bytes>& contributions, Reduction reduction) {
  const Group& group = layout.group;
  if (group.num_nodes() == 1) return reduce_by_numa(layout, group.ranks_of_node(0), contributions, reduction);
  Reduction within = reduction;
  within.scale = 1.0;
  std::vector<Bytes> partials;
  for (int node = 0; node < group.num_nodes(); ++node) {
    partials.push_back(reduce_by_numa(layout, group.ranks_of_node(node), contributions, within));
  }
  if (!reduction.wire_dtype) return reduce_in_order(partials, reduction);
  for (Bytes& partial : partials) partial = through(*reduction.wire_dtype, partial);
  return through(*reduction.wire_dtype, reduce_in_order(partials, reduction));
}

}  // namespace dtrain::test
