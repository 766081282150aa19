// SPDX-License-Identifier: Apache-2.0
// The boundary to Python: DLPack views in (tensor.hpp), spans on. Every call that may block releases the GIL. Tensors
// must stay alive until their operation is done; backend.py sees to that.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "bindings/gil.hpp"
#include "bindings/group.hpp"
#include "collectives/errors.hpp"
#include "engine_version.hpp"
#include "kernels/reduce.hpp"
#include "mpi/introduction.hpp"
#include "mpi/library.hpp"
#include "mpi/mailbox.hpp"
#include "runtime/watchdog.hpp"

namespace nb = nanobind;

namespace {

using namespace dtrain;

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
      .value("MAX", ReduceOp::max)
      .value("BAND", ReduceOp::bit_and)
      .value("BOR", ReduceOp::bit_or)
      .value("BXOR", ReduceOp::bit_xor);

  nb::enum_<DataType>(m, "WireDtype").value("bfloat16", DataType::bfloat16).value("float16", DataType::float16);

  bind_group(m);

  nb::class_<mpi::Mailbox>(m, "Mailbox")
      .def_prop_ro("rank", &mpi::Mailbox::rank)
      .def_prop_ro("size", &mpi::Mailbox::size)
      .def(
          "post",
          [](mpi::Mailbox& self, const nb::bytes& message, int destination) {
            const std::span bytes(static_cast<const std::byte*>(message.data()), message.size());
            const GilRelease release;
            self.post(bytes, destination);
          },
          nb::arg("message"), nb::arg("destination"))
      .def("is_flushed", &mpi::Mailbox::is_flushed, nb::call_guard<GilRelease>())
      .def("collect", [](mpi::Mailbox& self) -> std::optional<nb::bytes> {
        std::optional<std::vector<std::byte>> message;
        {
          const GilRelease release;
          message = self.collect();
        }
        if (!message) return std::nullopt;
        return nb::bytes(message->data(), message->size());
      });

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, std::uintptr_t communicator_address, int max_ranks_per_node, std::optional<int> numa_node,
             bool initialized_mpi, std::optional<int> cpu_limit, bool survives_deaths) {
            const GilRelease release;
            new (self) Engine({communicator_address, max_ranks_per_node, numa_node, initialized_mpi, cpu_limit,
                               survives_deaths});
          },
          nb::arg("communicator_address") = 0, nb::arg("max_ranks_per_node") = 0,
          nb::arg("numa_node") = nb::none(), nb::arg("initialized_mpi") = false, nb::arg("cpu_limit") = nb::none(),
          nb::arg("survives_deaths") = false,
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
            const GilRelease release;
            return EngineGroup{self, self->create_group(ranks)};
          },
          nb::arg("ranks"), "Collective over the ranks named, blocks.")
      .def("create_mailbox", &Engine::create_mailbox, nb::call_guard<GilRelease>(),
           "Collective over all ranks, blocks.")
      .def(
          "set_limits",
          [](Engine& self, std::optional<double> report_seconds, std::optional<double> timeout_seconds) {
            self.watch().set_limits(report_seconds, timeout_seconds);
          },
          nb::arg("report_seconds"), nb::arg("timeout_seconds"),
          "A wait is reported before it has lasted so long, at first 5; a rank that is silent for the timeout, at first "
          "600, ends the job. None leaves a limit as it is. Local.")
      .def("set_stack_signal", [](Engine& self, int signal) { self.watch().set_stack_signal(signal); },
           nb::arg("signal"), "Sent to the main thread when others wait for this rank; 0 for none. Local.")
      .def(
          "note_call",
          [](Engine& self, const std::string& call, const std::string& file, int line) {
            self.watch().note_call(call, file, line);
          },
          nb::arg("call"), nb::arg("file"), nb::arg("line"), "The script calls the trainer, from there. Local.")
      .def("note_return", [](Engine& self) { self.watch().note_return(); }, "And has got its result. Local.")
      .def("describe_places", [](Engine& self) { return self.watch().describe_places(); }, nb::call_guard<GilRelease>(),
           "The last note_call() of each rank, in words. Asks other nodes, which takes up to a second. Local.")
      .def("is_rank_lost", [](Engine& self) { return self.watch().is_rank_lost(); }, nb::call_guard<GilRelease>(),
           "Whether some rank is dead, stopped or silent. Likewise.")
      .def("note_failure", [](Engine& self) { self.watch().note_failure(); },
           "The exception that ends this rank was printed. Local.")
      .def(
          "has_lost_rank",
          [](Engine& self, double timeout_seconds) {
            const GilRelease release;
            return self.has_lost_rank(std::chrono::milliseconds(static_cast<int>(1000 * timeout_seconds)));
          },
          nb::arg("timeout_seconds"),
          "With survives_deaths: whether a rank was killed, so that nothing can be called but recover(). Waits for the "
          "word of it, up to the timeout. Local.")
      .def("recover", &Engine::recover, nb::call_guard<GilRelease>(),
           "Then: the engine of the ranks that live, in their order. Collective over them, blocks.")
      .def("start_replacement", &Engine::start_replacement, nb::arg("command"), nb::arg("arguments"),
           nb::arg("folder"), nb::call_guard<GilRelease>(), "Starts a process to take the place of a rank. Local, for rank 0.")
      .def("has_replacement", &Engine::has_replacement, nb::call_guard<GilRelease>(), "Whether there is one. Local.")
      .def("has_ready_replacement", &Engine::has_ready_replacement, nb::call_guard<GilRelease>(),
           "Whether it waits in join(). Local.")
      .def("admit", &Engine::admit, nb::call_guard<GilRelease>(),
           "Then: the engine of all ranks and that process, the last of them. Collective over them, blocks.")
      .def("join", &Engine::join, nb::call_guard<GilRelease>(),
           "In that process: likewise; None if it is not needed any more. Blocks.")
      .def("close", &Engine::close, nb::call_guard<GilRelease>());

  // host_facts.py finds this in the module's file, without loading it.
  constexpr std::string_view marked_version = "distributed_trainer engine " ENGINE_VERSION;
  m.attr("engine_version") = marked_version.substr(marked_version.rfind(' ') + 1).data();
  m.def(
      "introduce",
      [](std::uintptr_t communicator_address, const std::string& own) {
        const GilRelease release;
        mpi::Introductions introductions = mpi::introduce(communicator_address, own);
        return std::pair(std::move(introductions.texts), introductions.initialized_mpi);
      },
      nb::arg("communicator_address"), nb::arg("own"),
      "Gathers a text of every rank, before there is an engine; also says whether this has initialised MPI. Collective "
      "over the communicator, blocks.");
  m.def("world_rank_and_size", &mpi::world_rank_and_size, "Of the launch, whatever the engine's communicator.");
  m.def("is_replacement", &mpi::Replacement::is_this_process, "Whether a rank has started this process. Local.");
  m.def("survives_deaths", &mpi::survives_deaths, "Whether MPI lives on when a rank is killed. Local.");
  m.def("library_version", &mpi::library_version);
  m.def("kernel_isa", &kernel_isa);
  m.def("abort", &mpi::abort, nb::arg("exit_code"), "Ends all ranks of the job.");
  m.def("end_with_launcher", &end_with_launcher, nb::arg("launcher_pid"),
        "Ends this process when that one is gone.");
}
