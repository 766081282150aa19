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

#include "at.hpp"
#include "bindings/gil.hpp"
#include "bindings/tensor.hpp"
#include "collectives/all_gather.hpp"
#include "collectives/all_reduce.hpp"
#include "collectives/all_to_all.hpp"
#include "collectives/barrier.hpp"
#include "collectives/broadcast.hpp"
#include "collectives/gather.hpp"
#include "collectives/gather_shards.hpp"
#include "collectives/messages.hpp"
#include "collectives/parts.hpp"
#include "collectives/reduce.hpp"
#include "collectives/reduce_scatter.hpp"
#include "collectives/reduce_shards.hpp"
#include "collectives/scatter.hpp"

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
  const auto deadline = steady_clock::now() +
                        duration_cast<microseconds>(duration<double>(timeout_seconds.value_or(0)));
  std::optional<StallMonitor::Waiting> waiting;
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
    if (!waiting) waiting.emplace(pending.engine->monitor(), pending.group->world_ranks(), pending.operation->call());
  }
  pending.operation->rethrow();
  return true;
}

// Returns the part of each rank: the memory of a list of tensors of `dtype`, or equal parts of one tensor.
template <class Byte>
std::vector<std::span<Byte>> parts_of(nb::handle tensors, const EngineGroup& group, DataType dtype) {
  const auto size = static_cast<std::size_t>(group.group->size());
  const auto checked = [dtype](nb::handle tensor) -> std::span<Byte> {
    const TensorMemory memory = memory_of(tensor);
    if (memory.dtype == dtype) return memory.bytes;
    const std::string text = std::string("tensors of one collective must have one dtype, not ") + name(dtype) +
                             " and " + name(memory.dtype);
    throw nb::type_error(text.c_str());
  };
  std::vector<std::span<Byte>> parts;
  if (nb::isinstance<nb::list>(tensors)) {
    for (const nb::handle tensor : nb::cast<nb::list>(tensors)) parts.push_back(checked(tensor));
    return parts;
  }
  const std::span<Byte> whole = checked(tensors);
  const std::size_t num_elements = whole.size() / element_bytes(dtype);
  if (num_elements % size != 0) {
    const std::string text = std::to_string(num_elements) + " elements can't be cut into equal parts for " +
                             std::to_string(size) + " ranks";
    throw nb::value_error(text.c_str());
  }
  return even_parts(whole, size);
}

DataType dtype_of_parts(nb::handle tensors) {
  if (!nb::isinstance<nb::list>(tensors)) return memory_of(tensors).dtype;
  for (const nb::handle tensor : nb::cast<nb::list>(tensors)) return memory_of(tensor).dtype;
  return DataType::other;
}

// Submits the call that `prepare` makes for the group, with the GIL released.
template <class Prepare>
Pending submit(const EngineGroup& self, Prepare&& prepare) {
  const GilRelease release;
  return {self.engine, self.group, self.engine->submit(prepare(*self.group))};
}

}  // namespace

void bind_group(nb::module_& m) {
  nb::class_<Pending>(m, "Operation", "Collective or message that was submitted.")
      .def("wait", &wait, nb::arg("timeout_seconds") = nb::none(),
           "Block until the operation is done and return True; return False after timeout_seconds (None: no limit).\n\n"
           "Raise the error with which the operation failed.")
      .def(
          "found_nonfinite", [](const Pending& pending) { return pending.operation->found_nonfinite(); },
          "Return whether the result holds an infinity or NaN; for reduce_shards, this rank's shards of it.\n\n"
          "Raise ValueError unless the operation is done without error and was called with check_finite=True.")
      .def(
          "is_done",
          [](const Pending& pending) {
            if (!pending.operation->is_done()) {
              const GilRelease release;
              pending.engine->poll();
            }
            return pending.operation->is_done();
          },
          "Return whether the operation is done, with or without error. Does not block.")
      .def_prop_ro(
          "done_at_ns",
          [](const Pending& pending) {
            using namespace std::chrono;
            return pending.operation->is_done()
                       ? std::optional(nanoseconds(pending.operation->done_at().time_since_epoch()).count())
                       : std::nullopt;
          },
          "Time at which this process saw the operation done, by the clock of time.perf_counter_ns(); None before.")
      .def_prop_ro(
          "source", [](const Pending& pending) { return pending.operation->source(); },
          "Rank that sent the message, once a receive is done.");

  nb::class_<EngineGroup>(
      m, "Group",
      "Group of ranks and its collectives.\n\n"
      "A collective returns at once; the operation that it returns is to be waited for. All ranks of the group must "
      "call the same collectives in the same order. Tensors are contiguous and on the CPU, and must stay alive until "
      "the operation is done. Ranks are numbers in this group.")
      .def_prop_ro(
          "rank", [](const EngineGroup& self) { return self.group->rank(); }, "Number of this rank in the group.")
      .def_prop_ro(
          "size", [](const EngineGroup& self) { return self.group->size(); }, "Number of ranks in the group.")
      .def_prop_ro(
          "world_ranks", [](const EngineGroup& self) { return self.group->world_ranks(); },
          "Number in the engine of each rank of the group.")
      .def_prop_ro(
          "num_nodes", [](const EngineGroup& self) { return self.group->num_nodes(); },
          "Number of nodes on which the group has ranks.")
      .def(
          "allocate",
          [](const EngineGroup& self, std::size_t num_bytes) {
            std::shared_ptr<const Allocation> allocation;
            {
              const GilRelease release;
              allocation = self.engine->allocate(*self.group, num_bytes);
            }
            const auto block = at(*allocation, self.group->local().rank()).bytes();
            using Owner = std::shared_ptr<const Allocation>;
            const nb::capsule owner(new Owner(allocation), [](void* p) noexcept { delete static_cast<Owner*>(p); });
            const std::size_t shape[] = {num_bytes};
            return nb::ndarray<std::uint8_t, nb::device::cpu>(block.data(), 1, shape, owner);
          },
          nb::arg("num_bytes"), nb::rv_policy::reference,
          "Allocate num_bytes of zeroed memory in which this group's collectives need no copies. Collective, blocks.")
      .def(
          "release",
          [](const EngineGroup& self, nb::handle memory) {
            const auto bytes = memory_of(memory).bytes;
            const GilRelease release;
            self.engine->release(*self.group, bytes);
          },
          nb::arg("memory"), "Release memory of allocate() from use in place; it is freed with its last view. Local.")
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
          "Allocate one zeroed block of num_bytes on each node, which the group's ranks there share. Collective, "
          "blocks.")
      .def(
          "all_reduce",
          [](const EngineGroup& self, nb::handle buffer, ReduceOp op, std::optional<DataType> wire_dtype,
             bool check_finite) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = dtype, .op = op, .wire_dtype = wire_dtype, .check_finite = check_finite};
            return submit(self, [&](Group& g) { return all_reduce(g, bytes, reduction); });
          },
          nb::arg("buffer"), nb::arg("op") = ReduceOp::sum, nb::arg("wire_dtype") = nb::none(),
          nb::arg("check_finite") = false,
          "Reduce buffer over all ranks, in place.\n\n"
          "wire_dtype: type in which sums of float32 cross between nodes; None for buffer's own. check_finite: look "
          "for "
          "infinities and NaN in the result, for found_nonfinite().")
      .def(
          "reduce",
          [](const EngineGroup& self, nb::handle buffer, ReduceOp op, int root) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = dtype, .op = op};
            return submit(self, [&](Group& g) { return reduce(g, bytes, reduction, root); });
          },
          nb::arg("buffer"), nb::arg("op"), nb::arg("root"),
          "Reduce buffer over all ranks for rank root. Every rank's buffer gets the result.")
      .def(
          "broadcast",
          [](const EngineGroup& self, nb::handle buffer, int root) {
            const auto [bytes, dtype] = memory_of(buffer);
            return submit(self, [&](Group& g) { return broadcast(g, bytes, root, dtype); });
          },
          nb::arg("buffer"), nb::arg("root"), "Copy buffer of rank root to buffer of every rank.")
      .def(
          "all_gather",
          [](const EngineGroup& self, nb::handle input, nb::handle outputs) {
            const auto [source, dtype] = memory_of(input);
            const auto targets = parts_of<std::byte>(outputs, self, dtype);
            return submit(self, [&](Group& g) { return all_gather(g, source, targets, dtype); });
          },
          nb::arg("input"), nb::arg("outputs"),
          "Fill outputs[r] on every rank with input of rank r.\n\n"
          "outputs: a list with a tensor for each rank, or one tensor that is cut into equal parts.")
      .def(
          "all_to_all",
          [](const EngineGroup& self, nb::handle inputs, nb::handle outputs) {
            const DataType dtype = dtype_of_parts(inputs);
            const auto sends = parts_of<const std::byte>(inputs, self, dtype);
            const auto receives = parts_of<std::byte>(outputs, self, dtype);
            return submit(self, [&](Group& g) { return all_to_all(g, sends, receives, dtype); });
          },
          nb::arg("inputs"), nb::arg("outputs"),
          "Fill outputs[r] with this rank's entry in inputs of rank r.\n\n"
          "inputs, outputs: a list with a tensor for each rank, or one tensor that is cut into equal parts.")
      .def(
          "gather",
          [](const EngineGroup& self, nb::handle input, nb::handle outputs, int root) {
            const auto [source, dtype] = memory_of(input);
            std::vector<std::span<std::byte>> targets;
            if (!outputs.is_none()) targets = parts_of<std::byte>(outputs, self, dtype);
            return submit(self, [&](Group& g) { return gather(g, source, targets, root, dtype); });
          },
          nb::arg("input"), nb::arg("outputs").none(), nb::arg("root"),
          "Fill outputs[r] of rank root with input of rank r.\n\n"
          "outputs: a list with a tensor for each rank, or one tensor that is cut into equal parts; None on other "
          "ranks.")
      .def(
          "scatter",
          [](const EngineGroup& self, nb::handle inputs, nb::handle output, int root) {
            const auto [target, dtype] = memory_of(output);
            std::vector<std::span<const std::byte>> sources;
            if (!inputs.is_none()) sources = parts_of<const std::byte>(inputs, self, dtype);
            return submit(self, [&](Group& g) { return scatter(g, sources, target, root, dtype); });
          },
          nb::arg("inputs").none(), nb::arg("output"), nb::arg("root"),
          "Fill output of rank r with inputs[r] of rank root.\n\n"
          "inputs: a list with a tensor for each rank, or one tensor that is cut into equal parts; None on other "
          "ranks.")
      .def(
          "send",
          [](const EngineGroup& self, nb::handle tensor, int destination, int tag) {
            const auto [bytes, dtype] = memory_of(tensor);
            return submit(self, [&](Group& g) { return send(g, bytes, destination, tag, dtype); });
          },
          nb::arg("tensor"), nb::arg("destination"), nb::arg("tag"),
          "Send tensor to rank destination, which receives it with the same tag.")
      .def(
          "receive",
          [](const EngineGroup& self, nb::handle tensor, std::optional<int> source, int tag) {
            const auto [bytes, dtype] = memory_of(tensor);
            const int from = source.value_or(mpi::any_source);
            return submit(self, [&](Group& g) { return receive(g, bytes, from, tag, dtype); });
          },
          nb::arg("tensor"), nb::arg("source").none(), nb::arg("tag"),
          "Receive a message into tensor, which has its size. source: a rank; None for any.")
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
            const Pending pending = submit(self, [&](Group& g) {
              return all_gather(g, buffers->mine, even_parts<std::byte>(buffers->all, size), DataType::uint8);
            });
            pending.operation->keep(buffers);  // a signal may end the wait early
            wait(pending, std::nullopt);
            return nb::bytes(buffers->all.data(), buffers->all.size());
          },
          nb::arg("message"),
          "Return the messages of all ranks, one behind the other; all must have the same length. Collective, blocks.")
      .def(
          "reduce_scatter",
          [](const EngineGroup& self, nb::handle inputs, nb::handle output, ReduceOp op) {
            const auto [target, dtype] = reducible_memory_of(output);
            const auto sources = parts_of<const std::byte>(inputs, self, dtype);
            const Reduction reduction{.dtype = dtype, .op = op};
            return submit(self, [&](Group& g) { return reduce_scatter(g, sources, target, reduction); });
          },
          nb::arg("inputs"), nb::arg("output"), nb::arg("op") = ReduceOp::sum,
          "Fill output of rank r with the reduction of inputs[r] of all ranks.\n\n"
          "inputs: a list with a tensor for each rank, or one tensor that is cut into equal parts.")
      .def(
          "reduce_shards",
          [](const EngineGroup& self, nb::handle buffer, const Ranges& blocks, ReduceOp op, bool check_finite) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = dtype, .op = op, .check_finite = check_finite};
            return submit(self, [&](Group& g) { return reduce_shards(g, bytes, blocks_of(blocks), reduction); });
          },
          nb::arg("buffer"), nb::arg("blocks"), nb::arg("op") = ReduceOp::sum, nb::arg("check_finite") = false,
          "Reduce blocks of buffer over all ranks; each rank gets the result for its own shards, in place.\n\n"
          "buffer: in memory of allocate(). blocks: pairs (offset, length) in bytes; rank r owns part r of each. "
          "check_finite: look for infinities and NaN in the result, for found_nonfinite().")
      .def(
          "gather_shards",
          [](const EngineGroup& self, nb::handle buffer, const Ranges& blocks) {
            const auto bytes = memory_of(buffer).bytes;
            return submit(self, [&](Group& g) { return gather_shards(g, bytes, blocks_of(blocks)); });
          },
          nb::arg("buffer"), nb::arg("blocks"),
          "Gather the shards of blocks from all ranks into buffer, which is memory of allocate_shared().\n\n"
          "blocks: pairs (offset, length) in bytes; see reduce_shards().")
      .def(
          "describe_wait",
          [](const EngineGroup& self, const Pending& pending) {
            const GilRelease release;
            return self.engine->control().describe_wait(*self.group, *pending.operation);
          },
          nb::arg("operation"),
          "Describe what the operation waits for. Local; asks other nodes, which takes up to 1 s.")
      .def(
          "give_up",
          [](const EngineGroup& self, const std::string& reason) {
            const GilRelease release;
            self.engine->control().give_up(*self.group, reason);
          },
          nb::arg("reason"), "Fail all calls of every rank in this group, now and later, with reason. Local.")
      .def(
          "close",
          [](const EngineGroup& self) {
            const GilRelease release;
            self.engine->close_group(*self.group);
          },
          "Close the group on this rank, which takes part in none of its calls any more. Local.")
      .def(
          "barrier", [](const EngineGroup& self) { return submit(self, [](Group& g) { return barrier(g); }); },
          "Complete once every rank has called it.");
}

}  // namespace dtrain
