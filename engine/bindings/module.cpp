// SPDX-License-Identifier: Apache-2.0
// The boundary to Python: DLPack views in (tensor.hpp), spans on. Every call that may block releases the GIL. Tensors
// must stay alive until their operation is done; backend.py sees to that.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "bindings/tensor.hpp"
#include "collectives/errors.hpp"
#include "kernels/reduce.hpp"
#include "mpi/library.hpp"
#include "mpi/mailbox.hpp"
#include "runtime/engine.hpp"
#include "runtime/watchdog.hpp"

namespace nb = nanobind;

namespace {

using namespace dtrain;

// What Python holds: the engine goes last, whatever order the garbage collector takes.
struct EngineGroup {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Group> group;
};

struct Pending {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Operation> operation;
};

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
  for (;;) {
    auto slice = between_signal_checks;
    if (timeout_seconds) slice = std::min(slice, duration_cast<microseconds>(deadline - steady_clock::now()));
    bool done = false;
    {
      const nb::gil_scoped_release release;
      done = pending.engine->wait(*pending.operation, std::max(slice, microseconds(0)));
    }
    if (done) break;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (timeout_seconds && steady_clock::now() >= deadline) return false;
  }
  pending.operation->rethrow();
  return true;
}

// Raises `Error` as the Python exception `type`.
template <class Error>
void translate(nb::object type) {
  const auto translator = [](const std::exception_ptr& error, void* python_type) {
    try {
      std::rethrow_exception(error);
    } catch (const Error& e) {
      PyErr_SetString(static_cast<PyObject*>(python_type), e.what());
    }
  };
  nb::register_exception_translator(translator, type.release().ptr());
}

template <class Call>
Pending released(const EngineGroup& group, Call&& call) {
  const nb::gil_scoped_release release;
  return {group.engine, call(*group.engine, *group.group)};
}

}  // namespace

NB_MODULE(ENGINE_MODULE_NAME, m) {
  nb::set_leak_warnings(false);  // the engine lives until the process ends
  const nb::module_ errors = nb::module_::import_("distributed_trainer.errors");
  translate<mpi::Error>(errors.attr("DistributedTrainerError"));
  translate<RankLeft>(errors.attr("DistributedTrainerError"));
  translate<Mismatch>(errors.attr("MismatchError"));

  nb::enum_<ReduceOp>(m, "ReduceOp")
      .value("SUM", ReduceOp::sum)
      .value("AVERAGE", ReduceOp::average)
      .value("PRODUCT", ReduceOp::product)
      .value("MIN", ReduceOp::min)
      .value("MAX", ReduceOp::max);

  nb::enum_<DataType>(m, "WireDtype").value("bfloat16", DataType::bfloat16).value("float16", DataType::float16);

  nb::class_<Pending>(m, "Operation")
      .def("wait", &wait, nb::arg("timeout_seconds") = nb::none(),
           "Blocks until done; False after timeout_seconds. Raises what the operation failed with.")
      .def("is_done", [](const Pending& pending) {
        if (!pending.operation->is_done()) {
          const nb::gil_scoped_release release;
          pending.engine->poll();
        }
        return pending.operation->is_done();
      });

  nb::class_<EngineGroup>(m, "Group")
      .def_prop_ro("rank", [](const EngineGroup& self) { return self.group->rank(); })
      .def_prop_ro("size", [](const EngineGroup& self) { return self.group->size(); })
      .def_prop_ro("num_nodes", [](const EngineGroup& self) { return self.group->num_nodes(); })
      .def(
          "allocate",
          [](const EngineGroup& self, std::size_t num_bytes) {
            std::shared_ptr<const Allocation> allocation;
            {
              const nb::gil_scoped_release release;
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
            const nb::gil_scoped_release release;
            self.engine->release(*self.group, bytes);
          },
          nb::arg("memory"), "Forgets memory of allocate(); it goes with its last view. Local.")
      .def(
          "allocate_shared",
          [](const EngineGroup& self, std::size_t num_bytes) {
            using Owner = std::shared_ptr<const Mapping>;
            Owner block;
            {
              const nb::gil_scoped_release release;
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
          [](const EngineGroup& self, nb::handle buffer, ReduceOp op, std::optional<DataType> wire_dtype) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = *dtype, .op = op, .wire_dtype = wire_dtype};
            return released(self, [&](Engine& e, Group& g) { return e.all_reduce(g, bytes, reduction); });
          },
          nb::arg("buffer"), nb::arg("op") = ReduceOp::sum, nb::arg("wire_dtype") = nb::none(),
          "wire_dtype: type in which sums of float32 cross between nodes.")
      .def(
          "broadcast",
          [](const EngineGroup& self, nb::handle buffer, int root) {
            const auto bytes = memory_of(buffer).bytes;
            return released(self, [&](Engine& e, Group& g) { return e.broadcast(g, bytes, root); });
          },
          nb::arg("buffer"), nb::arg("root"))
      .def(
          "all_gather",
          [](const EngineGroup& self, nb::handle input, nb::handle output) {
            const auto source = memory_of(input).bytes;
            const auto target = memory_of(output).bytes;
            return released(self, [&](Engine& e, Group& g) { return e.all_gather(g, source, target); });
          },
          nb::arg("input"), nb::arg("output"))
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
              return e.all_gather(g, buffers->mine, buffers->all);
            });
            pending.operation->keep(buffers);  // a signal may end the wait early
            wait(pending, std::nullopt);
            return nb::bytes(buffers->all.data(), buffers->all.size());
          },
          nb::arg("message"), "The messages of all ranks, which have one length, in one piece. Collective, blocks.")
      .def(
          "reduce_scatter",
          [](const EngineGroup& self, nb::handle input, nb::handle output, ReduceOp op) {
            const TensorMemory source = reducible_memory_of(input);
            const TensorMemory target = reducible_memory_of(output);
            if (source.dtype != target.dtype) throw nb::type_error("reduce_scatter: input and output differ in type");
            const Reduction reduction{.dtype = *target.dtype, .op = op};
            return released(self, [&](Engine& e, Group& g) {
              return e.reduce_scatter(g, source.bytes, target.bytes, reduction);
            });
          },
          nb::arg("input"), nb::arg("output"), nb::arg("op") = ReduceOp::sum)
      .def(
          "reduce_shards",
          [](const EngineGroup& self, nb::handle buffer, const Ranges& blocks, ReduceOp op) {
            const auto [bytes, dtype] = reducible_memory_of(buffer);
            const Reduction reduction{.dtype = *dtype, .op = op};
            return released(self, [&](Engine& e, Group& g) {
              return e.reduce_shards(g, bytes, blocks_of(blocks), reduction);
            });
          },
          nb::arg("buffer"), nb::arg("blocks"), nb::arg("op") = ReduceOp::sum, "blocks: (offset, length) in bytes.")
      .def(
          "gather_shards",
          [](const EngineGroup& self, nb::handle buffer, const Ranges& blocks) {
            const auto bytes = memory_of(buffer).bytes;
            return released(self, [&](Engine& e, Group& g) { return e.gather_shards(g, bytes, blocks_of(blocks)); });
          },
          nb::arg("buffer"), nb::arg("blocks"), "blocks: (offset, length) in bytes.")
      .def(
          "close",
          [](const EngineGroup& self) {
            const nb::gil_scoped_release release;
            self.engine->close_group(*self.group);
          },
          "This rank takes part in nothing more of this group. Local.")
      .def("barrier", [](const EngineGroup& self) {
        return released(self, [](Engine& e, Group& g) { return e.barrier(g); });
      });

  nb::class_<mpi::Mailbox>(m, "Mailbox")
      .def_prop_ro("rank", &mpi::Mailbox::rank)
      .def_prop_ro("size", &mpi::Mailbox::size)
      .def(
          "post",
          [](mpi::Mailbox& self, const nb::bytes& message, int destination) {
            const std::span bytes(static_cast<const std::byte*>(message.data()), message.size());
            const nb::gil_scoped_release release;
            self.post(bytes, destination);
          },
          nb::arg("message"), nb::arg("destination"))
      .def("is_flushed", &mpi::Mailbox::is_flushed, nb::call_guard<nb::gil_scoped_release>())
      .def("collect", [](mpi::Mailbox& self) -> std::optional<nb::bytes> {
        std::optional<std::vector<std::byte>> message;
        {
          const nb::gil_scoped_release release;
          message = self.collect();
        }
        if (!message) return std::nullopt;
        return nb::bytes(message->data(), message->size());
      });

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, std::uintptr_t communicator_address, int max_ranks_per_node) {
            const nb::gil_scoped_release release;
            new (self) Engine({communicator_address, max_ranks_per_node});
          },
          nb::arg("communicator_address") = 0, nb::arg("max_ranks_per_node") = 0,
          "Initialises MPI unless that was done. Collective over the communicator, blocks.")
      .def_prop_ro("rank", &Engine::rank)
      .def_prop_ro("size", &Engine::size)
      .def_prop_ro("node_of_rank", [](const Engine& self) { return self.node().node_of_rank(); })
      .def("cores_of", [](const Engine& self, int rank) { return self.node().cores_of(rank); }, nb::arg("rank"))
      .def_prop_ro("has_thread", &Engine::has_thread)
      .def(
          "counters",
          [](const Engine& self) {
            nb::dict counts;
            counts["collectives"] = self.counters().collectives.load();
            counts["messages_sent"] = self.counters().messages_sent.load();
            counts["bytes_sent"] = self.counters().bytes_sent.load();
            counts["messages_received"] = self.counters().messages_received.load();
            counts["bytes_received"] = self.counters().bytes_received.load();
            counts["mpi_collectives"] = self.counters().mpi_collectives.load();
            return counts;
          },
          "What this rank has done since the start: collectives that succeeded; messages to and from other nodes and "
          "their bytes; calls of MPI's own collectives between nodes, whose messages are not counted.")
      .def(
          "create_group",
          [](const std::shared_ptr<Engine>& self, const std::vector<int>& ranks) {
            const nb::gil_scoped_release release;
            return EngineGroup{self, self->create_group(ranks)};
          },
          nb::arg("ranks"), "Collective over the ranks named, blocks.")
      .def("create_mailbox", &Engine::create_mailbox, nb::call_guard<nb::gil_scoped_release>(),
           "Collective over all ranks, blocks.")
      .def("close", &Engine::close, nb::call_guard<nb::gil_scoped_release>());

  m.def("world_rank_and_size", &mpi::world_rank_and_size, "Of the launch, whatever the engine's communicator.");
  m.def("library_version", &mpi::library_version);
  m.def("kernel_isa", &kernel_isa);
  m.def("abort", &mpi::abort, nb::arg("exit_code"), "Ends all ranks of the job.");
  m.def("end_with_launcher", &end_with_launcher, nb::arg("launcher_pid"),
        "Ends this process when that one is gone.");
}
