// SPDX-License-Identifier: Apache-2.0
#include "bindings/group.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/gil.hpp"
#include "bindings/tensor.hpp"
#include "collectives/parts.hpp"

namespace nb = nanobind;

namespace dtrain {
namespace {

using Ranges = std::vector<std::pair<std::size_t, std::size_t>>;

std::vector<Block> blocks_of(const Ranges& ranges) {
  std::vector<Block> blocks;
  for (const auto& [offset_bytes, num_bytes] : ranges) blocks.push_back({offset_bytes, num_bytes});
  return blocks;
}

// Waits with the GIL released, looking for signals now and then. Returns false after `timeout_seconds`.
bool wait(const Pending& pending, std::optional<double> timeout_seconds) {
  using namespace std::chrono;
  constexpr microseconds between_signal_checks(100000);
  const auto deadline = steady_clock::now() + duration_cast<microseconds>(duration<double>(timeout_seconds.value_or(0)));
  std::optional<Watch::Waiting> waiting;
  for (;;) {
    auto slice = between_signal_checks;
    if (timeout_seconds) slice = std::min(slice, duration_cast<microseconds>(deadline - steady_clock::now()));
    bool done = false;
    {
      const GilRelease release;
      done = pending.engine->wait(*pending.operation, std::max(slice, microseconds(0)));
    }
    if (done) break;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (timeout_seconds && steady_clock::now() >= deadline) return false;
    if (!waiting) waiting.emplace(pending.engine->watch(), pending.group->world_ranks(), pending.operation->call());
  }
  pending.operation->rethrow();
  return true;
}

// What each rank contributes or gets: the memory of a list of tensors of `dtype`, or equal parts of one tensor.
template <class Byte>
std::vector<std::span<Byte>> parts_of(nb::handle tensors, const EngineGroup& group, DataType dtype) {
  const auto size = static_cast<std::size_t>(group.group->size());
  const auto checked = [dtype](nb::handle tensor) -> std::span<Byte> {
    const TensorMemory memory = memory_of(tensor);
    if (memory.dtype == dtype) return memory.bytes;
    throw nb::type_error((std::string("tensors of one collective must have one dtype, not ") + name(dtype) + " and " +
                          name(memory.dtype)).c_str());
  };
  std::vector<std::span<Byte>> parts;
  if (nb::isinstance<nb::list>(tensors)) {
    for (const nb::handle tensor : nb::cast<nb::list>(tensors)) parts.push_back(checked(tensor));
    return parts;
  }
  const std::span<Byte> whole = checked(tensors);
  const std::size_t num_elements = whole.size() / element_bytes(dtype);
  if (num_elements % size != 0) {
    throw nb::value_error((std::to_string(num_elements) + " elements can't be cut into equal parts for " +
                           std::to_string(size) + " ranks").c_str());
  }
  return even_parts(whole, size);
}

DataType dtype_of_parts(nb::handle tensors) {
  if (!nb::isinstance<nb::list>(tensors)) return memory_of(tensors).dtype;
  for (const nb::handle tensor : nb::cast<nb::list>(tensors)) return memory_of(tensor).dtype;
  return DataType::other;
}

template <class Call>
Pending released(const EngineGroup& group, Call&& call) {
  const GilRelease release;
  return {group.engine, group.group, call(*group.engine, *group.group)};
}

}  // namespace

void bind_group(nb::module_& m) {
  nb::class_<Pending>(m, "Operation")
      .def("wait", &wait, nb::arg("timeout_seconds") = nb::none(),
           "Blocks until done; False after timeout_seconds. Raises what the operation failed with.")
      .def("found_nonfinite", [](const Pending& pending) { return pending.operation->found_nonfinite(); },
           "Whether the result holds an infinity or NaN; of reduce_shards, this rank's shards. ValueError unless done "
           "and called with check_finite=True.")
      .def("is_done", [](const Pending& pending) {
        if (!pending.operation->is_done()) {
          const GilRelease release;
          pending.engine->poll();
        }
        return pending.operation->is_done();
      })
      .def_prop_ro(
          "done_at_ns",
          [](const Pending& pending) {
            using namespace std::chrono;
            return pending.operation->is_done()
                       ? std::optional(nanoseconds(pending.operation->done_at().time_since_epoch()).count())
                       : std::nullopt;
          },
          "When it was done, by the clock of time.perf_counter_ns(); None before.")
      .def_prop_ro("source", [](const Pending& pending) { return pending.operation->source(); },
                   "Of a receive that is done: the rank that sent.");

  nb::class_<EngineGroup>(m, "Group")
      .def_prop_ro("rank", [](const EngineGroup& self) { return self.group->rank(); })
      .def_prop_ro("size", [](const EngineGroup& self) { return self.group->size(); })
      .def_prop_ro("world_ranks", [](const EngineGroup& self) { return self.group->world_ranks(); })
      .def_prop_ro("num_nodes", [](const EngineGroup& self) { return self.group->num_nodes(); })
      .def(
          "allocate",
          [](const EngineGroup& self, std::size_t num_bytes) {
            std::shared_ptr<const Allocation> allocation;
            {
              const GilRelease release;
              allocation = self.engine->allocate(*self.group, num_bytes);
            }
            const auto block = (*allocation)[static_cast<std::size_t>(self.group->local().rank())].bytes();
            using Owner = std::shared_ptr<const Allocation>;
            const nb::capsule owner(new Owner(allocation), [](void* p) noexcept { delete static_cast<Owner*>(p); });
            const std::size_t shape[] = {num_bytes};
            return nb::ndarray<std::uint8_t, nb::device::cpu>(block.data(), 1, shape, owner);
          },
          nb::arg("num_bytes"), nb::rv_policy::reference,
          "Memory in which this group's collectives need no copies, zeroed. Collective, blocks.")
      .def(
          "release",
          [](const EngineGroup& self, nb::handle memory) {
            const auto bytes = memory_of(memory).bytes;
            const GilRelease release;
            self.engine->release(*self.group, bytes);
          },
          nb::arg("memory"), "Forgets memory of allocate(); it goes with its last view. Local.")
      .def(
          "allocate_shared",
          [](const EngineGroup& self, std::size_t num_bytes) {
            using Owner = std::shared_ptr<const Mapping>;
            Owner block;
            {
              const GilRelease release;
              block = self.engine->allocate_shared(*self.group, num_bytes);
            }
            const nb::capsule owner(new Owner(block), [](void* p) noexcept { delete static_cast<Owner*>(p); });
            const std::size_t shape[] = {num_bytes};
            return nb::ndarray<std::uint8_t, nb::device::cpu>(block->bytes().data(), 1, shape, owner);
          },
          nb::arg("num_bytes"), nb::rv_policy::reference,
          "One zeroed block on each node, which all its ranks of the group map. Collective, blocks.")
      .def(
          "all_reduce",
          [](const EngineGroup& self, nb::handle buffer, ReduceOp op, std::optional<DataType> wire_dtype,
             bool check_finite) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = dtype, .op = op, .wire_dtype = wire_dtype, .check_finite = check_finite};
            return released(self, [&](Engine& e, Group& g) { return e.all_reduce(g, bytes, reduction); });
          },
          nb::arg("buffer"), nb::arg("op") = ReduceOp::sum, nb::arg("wire_dtype") = nb::none(),
          nb::arg("check_finite") = false,
          "wire_dtype: type in which sums of float32 cross between nodes. check_finite: for found_nonfinite().")
      .def(
          "reduce",
          [](const EngineGroup& self, nb::handle buffer, ReduceOp op, int root) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = dtype, .op = op};
            return released(self, [&](Engine& e, Group& g) { return e.reduce(g, bytes, reduction, root); });
          },
          nb::arg("buffer"), nb::arg("op"), nb::arg("root"), "Leaves the result in every rank's buffer.")
      .def(
          "broadcast",
          [](const EngineGroup& self, nb::handle buffer, int root) {
            const auto [bytes, dtype] = memory_of(buffer);
            return released(self, [&](Engine& e, Group& g) { return e.broadcast(g, bytes, root, dtype); });
          },
          nb::arg("buffer"), nb::arg("root"))
      .def(
          "all_gather",
          [](const EngineGroup& self, nb::handle input, nb::handle outputs) {
            const auto [source, dtype] = memory_of(input);
            const auto targets = parts_of<std::byte>(outputs, self, dtype);
            return released(self, [&](Engine& e, Group& g) { return e.all_gather(g, source, targets, dtype); });
          },
          nb::arg("input"), nb::arg("outputs"), "outputs, here and below: a list of tensors, or one to be cut evenly.")
      .def(
          "all_to_all",
          [](const EngineGroup& self, nb::handle inputs, nb::handle outputs) {
            const DataType dtype = dtype_of_parts(inputs);
            const auto sends = parts_of<const std::byte>(inputs, self, dtype);
            const auto receives = parts_of<std::byte>(outputs, self, dtype);
            return released(self, [&](Engine& e, Group& g) { return e.all_to_all(g, sends, receives, dtype); });
          },
          nb::arg("inputs"), nb::arg("outputs"))
      .def(
          "gather",
          [](const EngineGroup& self, nb::handle input, nb::handle outputs, int root) {
            const auto [source, dtype] = memory_of(input);
            std::vector<std::span<std::byte>> targets;
            if (!outputs.is_none()) targets = parts_of<std::byte>(outputs, self, dtype);
            return released(self, [&](Engine& e, Group& g) { return e.gather(g, source, targets, root, dtype); });
          },
          nb::arg("input"), nb::arg("outputs").none(), nb::arg("root"), "outputs: None but on the root.")
      .def(
          "scatter",
          [](const EngineGroup& self, nb::handle inputs, nb::handle output, int root) {
            const auto [target, dtype] = memory_of(output);
            std::vector<std::span<const std::byte>> sources;
            if (!inputs.is_none()) sources = parts_of<const std::byte>(inputs, self, dtype);
            return released(self, [&](Engine& e, Group& g) { return e.scatter(g, sources, target, root, dtype); });
          },
          nb::arg("inputs").none(), nb::arg("output"), nb::arg("root"), "inputs: None but on the root.")
      .def(
          "send",
          [](const EngineGroup& self, nb::handle tensor, int destination, int tag) {
            const auto [bytes, dtype] = memory_of(tensor);
            return released(self, [&](Engine& e, Group& g) { return e.send(g, bytes, destination, tag, dtype); });
          },
          nb::arg("tensor"), nb::arg("destination"), nb::arg("tag"))
      .def(
          "receive",
          [](const EngineGroup& self, nb::handle tensor, std::optional<int> source, int tag) {
            const auto [bytes, dtype] = memory_of(tensor);
            const int from = source.value_or(mpi::any_source);
            return released(self, [&](Engine& e, Group& g) { return e.receive(g, bytes, from, tag, dtype); });
          },
          nb::arg("tensor"), nb::arg("source").none(), nb::arg("tag"), "source: None for any.")
      .def(
          "gather_bytes",
          [](const EngineGroup& self, const nb::bytes& message) {
            struct Buffers {
              std::vector<std::byte> mine, all;
            };
            const auto* data = static_cast<const std::byte*>(message.data());
            const auto size = static_cast<std::size_t>(self.group->size());
            const auto buffers = std::make_shared<Buffers>(
                Buffers{.mine = {data, data + message.size()}, .all = std::vector<std::byte>(message.size() * size)});
            const Pending pending = released(self, [&](Engine& e, Group& g) {
              return e.all_gather(g, buffers->mine, even_parts<std::byte>(buffers->all, size), DataType::uint8);
            });
            pending.operation->keep(buffers);  // a signal may end the wait early
            wait(pending, std::nullopt);
            return nb::bytes(buffers->all.data(), buffers->all.size());
          },
          nb::arg("message"), "The messages of all ranks, which have one length, in one piece. Collective, blocks.")
      .def(
          "reduce_scatter",
          [](const EngineGroup& self, nb::handle inputs, nb::handle output, ReduceOp op) {
            const auto [target, dtype] = reducible_memory_of(output);
            const auto sources = parts_of<const std::byte>(inputs, self, dtype);
            const Reduction reduction{.dtype = dtype, .op = op};
            return released(self, [&](Engine& e, Group& g) {
              return e.reduce_scatter(g, sources, target, reduction);
            });
          },
          nb::arg("inputs"), nb::arg("output"), nb::arg("op") = ReduceOp::sum)
      .def(
          "reduce_shards",
          [](const EngineGroup& self, nb::handle buffer, const Ranges& blocks, ReduceOp op, bool check_finite) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = dtype, .op = op, .check_finite = check_finite};
            return released(self, [&](Engine& e, Group& g) {
              return e.reduce_shards(g, bytes, blocks_of(blocks), reduction);
            });
          },
          nb::arg("buffer"), nb::arg("blocks"), nb::arg("op") = ReduceOp::sum, nb::arg("check_finite") = false,
          "blocks: (offset, length) in bytes. check_finite: for found_nonfinite().")
      .def(
          "gather_shards",
          [](const EngineGroup& self, nb::handle buffer, const Ranges& blocks) {
            const auto bytes = memory_of(buffer).bytes;
            return released(self, [&](Engine& e, Group& g) { return e.gather_shards(g, bytes, blocks_of(blocks)); });
          },
          nb::arg("buffer"), nb::arg("blocks"), "blocks: (offset, length) in bytes.")
      .def(
          "describe_wait",
          [](const EngineGroup& self, const Pending& pending) {
            const GilRelease release;
            return self.engine->describe_wait(*self.group, *pending.operation);
          },
          nb::arg("operation"), "What it waits for. Takes up to 1 s.")
      .def(
          "give_up",
          [](const EngineGroup& self, const std::string& reason) {
            const GilRelease release;
            self.engine->give_up(*self.group, reason);
          },
          nb::arg("reason"), "Fails what every rank calls in this group, now and later. Local.")
      .def(
          "close",
          [](const EngineGroup& self) {
            const GilRelease release;
            self.engine->close_group(*self.group);
          },
          "This rank takes part in nothing more of this group. Local.")
      .def("barrier", [](const EngineGroup& self) {
        return released(self, [](Engine& e, Group& g) { return e.barrier(g); });
      });
}

}  // namespace dtrain
