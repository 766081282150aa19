// SPDX-License-Identifier: Apache-2.0
// Boundary to Python: it takes tensors as DLPack views (tensor.hpp) and passes them on as spans. Every call that may
// block releases the GIL. Tensors must stay alive until their operation is done; the Python package's engine_group.py
// ensures that.
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
#include "mpi/library.hpp"
#include "mpi/mailbox.hpp"
#include "mpi/version_exchange.hpp"
#include "runtime/launcher_watch.hpp"

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

  nb::enum_<ReduceOp>(m, "ReduceOp", "Operation of a reduction.")
      .value("SUM", ReduceOp::sum)
      .value("AVERAGE", ReduceOp::average)
      .value("PRODUCT", ReduceOp::product)
      .value("MIN", ReduceOp::min)
      .value("MAX", ReduceOp::max)
      .value("BAND", ReduceOp::bit_and)
      .value("BOR", ReduceOp::bit_or)
      .value("BXOR", ReduceOp::bit_xor);

  nb::enum_<DataType>(m, "WireDtype", "Type in which sums of float32 cross between nodes.")
      .value("bfloat16", DataType::bfloat16)
      .value("float16", DataType::float16);

  bind_group(m);

  nb::class_<mpi::Mailbox>(m, "Mailbox", "Short messages between any two ranks. Its calls are local and do not block.")
      .def_prop_ro("rank", &mpi::Mailbox::rank, "Number of this rank.")
      .def_prop_ro("size", &mpi::Mailbox::size, "Number of ranks.")
      .def(
          "post",
          [](mpi::Mailbox& self, const nb::bytes& message, int destination) {
            const std::span bytes(static_cast<const std::byte*>(message.data()), message.size());
            const GilRelease release;
            self.post(bytes, destination);
          },
          nb::arg("message"), nb::arg("destination"), "Send message to rank destination.")
      .def("is_flushed", &mpi::Mailbox::is_flushed, nb::call_guard<GilRelease>(),
           "Return whether everything posted has left this rank.")
      .def(
          "collect",
          [](mpi::Mailbox& self) -> std::optional<nb::bytes> {
            std::optional<std::vector<std::byte>> message;
            {
              const GilRelease release;
              message = self.collect();
            }
            if (!message) return std::nullopt;
            return nb::bytes(message->data(), message->size());
          },
          "Return a message that has arrived from any rank, or None. Messages of one rank arrive in order.");

  nb::class_<Engine>(m, "Engine", "Groups of this process's ranks, and their memory. It belongs to one set of ranks.")
      .def(
          "__init__",
          [](Engine* self, std::uintptr_t communicator_address, int max_ranks_per_node, std::optional<int> numa_node,
             bool initialized_mpi, std::optional<int> cpu_limit, bool survives_deaths) {
            const GilRelease release;
            new (self) Engine(
                {communicator_address, max_ranks_per_node, numa_node, initialized_mpi, cpu_limit, survives_deaths});
          },
          nb::arg("communicator_address") = 0, nb::arg("max_ranks_per_node") = 0, nb::arg("numa_node") = nb::none(),
          nb::arg("initialized_mpi") = false, nb::arg("cpu_limit") = nb::none(), nb::arg("survives_deaths") = false,
          "Initialise MPI unless it is initialised already. Collective over the communicator, blocks.\n\n"
          "communicator_address: address of the communicator; 0 for the world. max_ranks_per_node, numa_node: for "
          "tests, pretend nodes of that many ranks (0: the real nodes), and that this rank is on that NUMA node. "
          "initialized_mpi: exchange_versions() has initialised MPI, so close() finalises it. cpu_limit: number of "
          "processors that this machine's ranks get time on. survives_deaths: survive killed ranks; see recover().")
      .def_prop_ro("rank", &Engine::rank, "Number of this rank.")
      .def_prop_ro("size", &Engine::size, "Number of ranks.")
      .def_prop_ro(
          "node_of_rank", [](const Engine& self) { return self.node().node_of_rank(); },
          "Number of the node of each rank; nodes are numbered by their lowest rank.")
      .def(
          "cores_of", [](const Engine& self, int rank) { return self.node().cores_of(rank); }, nb::arg("rank"),
          "Return the numbers of the processors that rank may use. Local.")
      .def_prop_ro("has_thread", &Engine::has_thread, "Whether an engine thread drives the collectives.")
      .def(
          "counters",
          [](const Engine& self) -> nb::typed<nb::dict, nb::str, nb::int_> {
            nb::dict counts;
            counts["collectives"] = self.counters().collectives.load();
            counts["messages_sent"] = self.counters().messages_sent.load();
            counts["bytes_sent"] = self.counters().bytes_sent.load();
            counts["messages_received"] = self.counters().messages_received.load();
            counts["bytes_received"] = self.counters().bytes_received.load();
            counts["mpi_collectives"] = self.counters().mpi_collectives.load();
            return counts;
          },
          "Count what this rank has done since the engine started. Local.\n\n"
          "collectives: those that succeeded. messages_sent, bytes_sent, messages_received, bytes_received: messages "
          "to and from other nodes. mpi_collectives: calls of MPI's own collectives between nodes, whose messages are "
          "not counted.")
      .def(
          "create_group",
          [](const std::shared_ptr<Engine>& self, const std::vector<int>& ranks) {
            const GilRelease release;
            return EngineGroup{self, self->create_group(ranks)};
          },
          nb::arg("ranks"), "Create a group of ranks, in this order. Collective over them, blocks.")
      .def("create_mailbox", &Engine::create_mailbox, nb::call_guard<GilRelease>(),
           "Create a mailbox of all ranks. Collective over all ranks, blocks.")
      .def(
          "set_limits",
          [](Engine& self, std::optional<double> report_seconds, std::optional<double> timeout_seconds) {
            self.monitor().set_limits(report_seconds, timeout_seconds);
          },
          nb::arg("report_seconds"), nb::arg("timeout_seconds"),
          "Set the limits of waits; None leaves a limit unchanged. Local.\n\n"
          "report_seconds, at first 5: a wait is reported before it has lasted so long. timeout_seconds, at first 600: "
          "a rank that is silent for so long ends the job.")
      .def(
          "set_stack_signal", [](Engine& self, int signal, int pipe) { self.monitor().set_stack_signal(signal, pipe); },
          nb::arg("signal"), nb::arg("pipe"),
          "Set the signal that the main thread gets when others wait for this rank. Local.\n\n"
          "Its handler writes the stack to a pipe; the engine prints what it reads from pipe, which does not block.")
      .def(
          "note_call",
          [](Engine& self, const std::string& call, const std::string& file, int line) {
            self.monitor().note_call(call, file, line);
          },
          nb::arg("call"), nb::arg("file"), nb::arg("line"),
          "Record that the script makes this call to the trainer, at that place. Local.")
      .def(
          "note_return", [](Engine& self) { self.monitor().note_return(); },
          "Record that the script's call to the trainer has returned. Local.")
      .def(
          "describe_places", [](Engine& self) { return self.monitor().describe_places(); },
          nb::call_guard<GilRelease>(),
          "Describe the last note_call() of each rank. Local; asks other nodes, which takes up to a fifth of "
          "report_seconds.")
      .def(
          "is_rank_lost", [](Engine& self) { return self.monitor().is_rank_lost(); }, nb::call_guard<GilRelease>(),
          "Return whether a rank is dead, stopped or silent. Local; takes as long as describe_places().")
      .def(
          "note_failure", [](Engine& self) { self.monitor().note_failure(); },
          "Record that the exception that ends this rank was printed. Local.")
      .def(
          "has_lost_rank",
          [](Engine& self, double timeout_seconds) {
            const GilRelease release;
            return self.recovery().has_lost_rank(std::chrono::milliseconds(static_cast<int>(1000 * timeout_seconds)));
          },
          nb::arg("timeout_seconds"),
          "Return whether a rank was killed, so that only recover() can be called; False without survives_deaths.\n\n"
          "Wait up to timeout_seconds for MPI to report the death. Local.")
      .def("recover", &Engine::recover, nb::call_guard<GilRelease>(), nb::sig("def recover(self) -> Engine | None"),
           "Make the engine of the ranks that live, in their order, after has_lost_rank(). Collective over them, "
           "blocks.\n\n"
           "Return None if one of them is in close(): the other ranks have reached their end.")
      .def(
          "start_replacement",
          [](Engine& self, const std::string& command, const std::vector<std::string>& arguments,
             const std::string& folder) { self.recovery().start_replacement(command, arguments, folder); },
          nb::arg("command"), nb::arg("arguments"), nb::arg("folder"), nb::call_guard<GilRelease>(),
          "Start a process that replaces a killed rank: command with arguments, in folder. Local; for rank 0.")
      .def(
          "has_replacement", [](Engine& self) { return self.recovery().has_replacement(); },
          nb::call_guard<GilRelease>(), "Return whether a process that this rank has started lives. Local.")
      .def(
          "has_ready_replacement", [](Engine& self) { return self.recovery().has_ready_replacement(); },
          nb::call_guard<GilRelease>(), "Return whether that process waits in join(). Local.")
      .def("admit", &Engine::admit, nb::call_guard<GilRelease>(),
           "Make the engine of all ranks and of the process that waits in join(), the last of them.\n\n"
           "Collective over all of them, blocks.")
      .def("join", &Engine::join, nb::call_guard<GilRelease>(), nb::sig("def join(self) -> Engine | None"),
           "Make the engine that admit() makes, in the new process; return None if the process is not needed any "
           "more.\n\n"
           "Collective over all ranks of that engine, blocks.")
      .def("close", &Engine::close, nb::call_guard<GilRelease>(),
           "Fail operations in flight and finalise MPI if the engine initialised it. Collective; nothing in a forked "
           "child.");

  // host_facts.py finds this in the module's file, without loading it.
  constexpr std::string_view marked_version = "distributed_trainer engine " ENGINE_VERSION;
  m.attr("engine_version") = marked_version.substr(marked_version.rfind(' ') + 1).data();
  m.def(
      "exchange_versions",
      [](std::uintptr_t communicator_address, const std::string& own) {
        const GilRelease release;
        mpi::VersionExchange exchange = mpi::exchange_versions(communicator_address, own);
        return std::pair(std::move(exchange.texts), exchange.initialized_mpi);
      },
      nb::arg("communicator_address"), nb::arg("own"),
      "Gather a text from every rank before there is an engine; also return whether this call has initialised MPI.\n\n"
      "Collective over the communicator (see Engine), blocks.");
  m.def("world_rank_and_size", &mpi::world_rank_and_size,
        "Return this process's rank and the number of ranks in the launch, whatever the engine's communicator. Local.");
  m.def("is_replacement", &mpi::Replacement::is_this_process,
        "Return whether a rank has started this process to replace another. Local.");
  m.def("survives_deaths", &mpi::survives_deaths, "Return whether MPI continues when a rank is killed. Local.");
  m.def("library_version", &mpi::library_version, "Return the first line of the MPI library's version. Local.");
  m.def("kernel_isa", &kernel_isa, "Return the name of the instruction set that reductions use. Local.");
  m.def("abort", &mpi::abort, nb::arg("exit_code"), nb::sig("def abort(exit_code: int) -> typing.NoReturn"),
        "End all ranks of the job with exit_code. Local.");
  m.def("end_with_launcher", &end_with_launcher, nb::arg("launcher_pid"),
        "End this process when the process launcher_pid is gone. Local, returns at once.");
}
