// SPDX-License-Identifier: Apache-2.0
#include "mpi/replacement.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <optional>
#include <sstream>
#include <utility>

#include "mpi/library.hpp"
#include "mpi/ulfm.hpp"

namespace dtrain::mpi {
namespace {

constexpr int greeting_tag = 0;
constexpr int ready_tag = 1;
constexpr int answer_tag = 2;
constexpr int meeting_tag = 3;
constexpr char admitted = 1;
constexpr char dismissed = 0;
constexpr std::chrono::milliseconds between_looks(5);
// Variable in the new process's environment: the ProcessName of the process that has started it.
constexpr const char* starter_variable = "DTRAIN_STARTER";
constexpr const char* admission = "the admission of a new process";

// Calls `give_up` if the process at the other end dies, or if the guarded work takes too long; the destructor ends the
// guard. It is needed because MPI need not notice the death of a process that is not in this process's world yet.
class Guard {
 public:
  Guard(pid_t other, std::function<void()> give_up)
      : thread_([this, other, give_up = std::move(give_up)] {
          const auto deadline = std::chrono::steady_clock::now() + Deadline::longest;
          while (!is_over_) {
            if (has_died(other) || std::chrono::steady_clock::now() > deadline) return give_up();
            std::this_thread::sleep_for(between_looks);
          }
        }) {}
  ~Guard() {
    is_over_ = true;
    thread_.join();
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  // Whether a process of this machine has died; false for processes of other machines.
  static bool has_died(pid_t process) {
    if (process == 0) return false;
    const std::ifstream file("/proc/" + std::to_string(process) + "/stat");
    std::ostringstream text;
    text << file.rdbuf();
    const std::string stat = text.str();
    const std::size_t end = stat.rfind(')');
    return end == std::string::npos || end + 2 >= stat.size() || stat[end + 2] == 'Z' || stat[end + 2] == 'X';
  }

 private:
  std::atomic<bool> is_over_ = false;
  std::thread thread_;
};

// Name by which one end of the connection knows the other.
struct ProcessName {
  std::uint64_t pid_namespace;
  std::int64_t pid;

  static ProcessName own() {
    struct stat about{};
    const bool is_known = stat("/proc/self/ns/pid", &about) == 0;
    return {is_known ? static_cast<std::uint64_t>(about.st_ino) ^ boot() : 0, getpid()};
  }

  std::string text() const { return std::to_string(pid_namespace) + " " + std::to_string(pid); }

  // The process's number in this process's namespace, or 0.
  pid_t here() const {
    return pid_namespace != 0 && pid_namespace == own().pid_namespace ? static_cast<pid_t>(pid) : 0;
  }

 private:
  // The boot ID is part of the name, since namespaces have the same numbers on all machines.
  static std::uint64_t boot() {
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    std::string id;
    std::getline(file, id);
    return std::hash<std::string>()(id);
  }
};

bool has_lost(MPI_Comm connection) {
  int flag = 0;
  MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &flag, MPI_STATUS_IGNORE);
  MPI_Group failed = MPI_GROUP_NULL;
  if (MPIX_Comm_get_failed(connection, &failed) != MPI_SUCCESS) return true;
  int size = 0;
  MPI_Group_size(failed, &size);
  MPI_Group_free(&failed);
  return size > 0;
}

// Merges the ranks on this side with the other side, over `pair`: the starting rank (0) and the new process (1).
MPI_Comm merge(MPI_Comm own_side, MPI_Comm pair, bool is_new) {
  MPI_Comm between = MPI_COMM_NULL;
  MPI_Comm merged = MPI_COMM_NULL;
  check(MPI_Intercomm_create(own_side, 0, pair, is_new ? 0 : 1, meeting_tag, &between), "MPI_Intercomm_create");
  check(MPI_Intercomm_merge(between, is_new ? 1 : 0, &merged), "MPI_Intercomm_merge");
  return merged;  // the other communicators are not freed: see Engine::retire()
}

// Connects each rank with each other rank. A process learns of the death of a process that was started at another time
// only by the end of their connection, and all of MPI's calls that survive a death wait for a dead rank of which they
// do not know.
void connect(MPI_Comm all) {
  int size = 0;
  check(MPI_Comm_size(all, &size), "MPI_Comm_size");
  const char sent = 0;
  std::vector<char> received(static_cast<std::size_t>(size));
  std::vector<MPI_Request> requests(2 * received.size(), MPI_REQUEST_NULL);
  for (int peer = 0; peer < size; ++peer) {
    const auto number = static_cast<std::size_t>(peer);
    MPI_Irecv(&received[number], 1, MPI_BYTE, peer, meeting_tag, all, &requests[2 * number]);
    MPI_Isend(&sent, 1, MPI_BYTE, peer, meeting_tag, all, &requests[2 * number + 1]);
  }
  for (MPI_Request& request : requests) MPI_Wait(&request, MPI_STATUS_IGNORE);  // a failure shows the death, too
}

}  // namespace

Replacement::Replacement(const std::string& command, const std::vector<std::string>& arguments,
                         const std::string& folder)
    : thread_([this, command, arguments, folder] { start(command, arguments, folder); }) {}

Replacement::~Replacement() {
  if (thread_.joinable()) thread_.join();
}

void Replacement::start(std::string command, std::vector<std::string> arguments, const std::string& folder) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  MPI_Info info = MPI_INFO_NULL;
  MPI_Info_create(&info);
  MPI_Info_set(info, "wdir", folder.c_str());
  MPI_Info_set(info, "PMIX_ENVAR", (std::string(starter_variable) + "=" + ProcessName::own().text()).c_str());
  MPI_Comm self = MPI_COMM_NULL;
  int code = MPI_Comm_dup(MPI_COMM_SELF, &self);
  if (code == MPI_SUCCESS) {
    MPI_Comm_set_errhandler(self, MPI_ERRORS_RETURN);
    code = MPI_Comm_spawn(command.data(), argv.data(), 1, info, 0, self, &connection_, MPI_ERRCODES_IGNORE);
    MPI_Comm_free(&self);
  }
  MPI_Info_free(&info);
  if (code == MPI_SUCCESS) {
    MPI_Comm_set_errhandler(connection_, MPI_ERRORS_RETURN);
    const ProcessName own = ProcessName::own();
    code = MPI_Send(&own, sizeof(own), MPI_BYTE, 0, greeting_tag, connection_);
  }
  has_failed_ = code != MPI_SUCCESS;
  is_started_ = true;
}

bool Replacement::is_ready() {
  if (!is_started_ || has_failed_) return false;
  int has_arrived = 0;
  has_failed_ = MPI_Iprobe(0, ready_tag, connection_, &has_arrived, MPI_STATUS_IGNORE) != MPI_SUCCESS;
  return has_arrived != 0;
}

bool Replacement::has_failed() {
  if (is_started_ && !has_failed_) has_failed_ = has_lost(connection_);
  return has_failed_;
}

void Replacement::dismiss() {
  if (thread_.joinable()) thread_.join();
  if (has_failed()) return;
  if (MPI_Send(&dismissed, 1, MPI_BYTE, 0, answer_tag, connection_) == MPI_SUCCESS) MPI_Comm_disconnect(&connection_);
}

std::optional<Deadline> Replacement::guard_start() {
  // NOLINTNEXTLINE(concurrency-mt-unsafe): no thread of the engine changes the environment
  const char* text = std::getenv(starter_variable);
  ProcessName starter{};
  if (text == nullptr || !(std::istringstream(text) >> starter.pid_namespace >> starter.pid)) return std::nullopt;
  constexpr std::chrono::seconds longest_start(60);  // if the starter is on another machine
  const pid_t pid = starter.here();
  return std::optional<Deadline>(std::in_place, "the start of this process",
                                 pid == 0 ? longest_start : Deadline::longest,
                                 [pid] { return pid == 0 || Guard::has_died(pid); });
}

bool Replacement::is_this_process() {
  MPI_Comm parent = MPI_COMM_NULL;
  check(MPI_Comm_get_parent(&parent), "MPI_Comm_get_parent");
  return parent != MPI_COMM_NULL;
}

std::optional<Communicator> Replacement::join() {
  MPI_Comm parent = MPI_COMM_NULL;
  check(MPI_Comm_get_parent(&parent), "MPI_Comm_get_parent");
  for (const MPI_Comm one : {parent, MPI_COMM_SELF}) {
    check(MPI_Comm_set_errhandler(one, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
  ProcessName starter{};
  check(MPI_Recv(&starter, sizeof(starter), MPI_BYTE, 0, greeting_tag, parent, MPI_STATUS_IGNORE), "MPI_Recv");
  const ProcessName own = ProcessName::own();
  check(MPI_Send(&own, sizeof(own), MPI_BYTE, 0, ready_tag, parent), "MPI_Send");
  for (int has_arrived = 0; has_arrived == 0;) {
    check(MPI_Iprobe(0, answer_tag, parent, &has_arrived, MPI_STATUS_IGNORE), "MPI_Iprobe");
    if (has_lost(parent) || Guard::has_died(starter.here())) throw Error("the rank that has started this one is gone");
    std::this_thread::sleep_for(between_looks);
  }
  char answer = dismissed;
  check(MPI_Recv(&answer, 1, MPI_BYTE, 0, answer_tag, parent, MPI_STATUS_IGNORE), "MPI_Recv");
  if (answer == dismissed) {
    MPI_Comm_disconnect(&parent);
    return std::nullopt;
  }
  const Guard guard(starter.here(),
                    [] { kill(getpid(), SIGKILL); });  // so that the others can continue without this one
  MPI_Comm pair = MPI_COMM_NULL;
  check(MPI_Intercomm_merge(parent, 1, &pair), "MPI_Intercomm_merge");
  MPI_Comm_set_errhandler(pair, MPI_ERRORS_RETURN);
  const Communicator merged(merge(MPI_COMM_SELF, pair, true));
  check(MPI_Recv(&answer, 1, MPI_BYTE, 0, answer_tag, pair, MPI_STATUS_IGNORE),
        "MPI_Recv");  // all others have the communicator, too
  connect(merged.handle_);
  return merged;
}

Communicator admit(const Communicator& living, Replacement* own) {
  MPI_Comm pair = MPI_COMM_NULL;
  std::optional<Communicator> merged;
  std::optional<Guard> guard;
  std::string reason = "another rank has failed";
  try {
    if (own != nullptr) {
      ProcessName other{};
      const MPI_Comm connection = own->connection_;
      check(MPI_Recv(&other, sizeof(other), MPI_BYTE, 0, ready_tag, connection, MPI_STATUS_IGNORE), "MPI_Recv");
      guard.emplace(other.here(), [connection, living] {
        MPIX_Comm_revoke(connection);
        living.revoke();
      });
      check(MPI_Send(&admitted, 1, MPI_BYTE, 0, answer_tag, own->connection_), "MPI_Send");
      check(MPI_Intercomm_merge(own->connection_, 0, &pair), "MPI_Intercomm_merge");
      MPI_Comm_set_errhandler(pair, MPI_ERRORS_RETURN);
    }
    const Deadline deadline(admission, Deadline::longest_of(living.rank(), living.size()));
    merged = Communicator(merge(living.handle_, pair, false));
  } catch (const Error& error) {
    reason = error.what();
    living.revoke();  // others may wait for this rank
    if (pair != MPI_COMM_NULL) MPIX_Comm_revoke(pair);
  }
  if (!living.agree(merged.has_value())) {
    if (merged) merged->revoke();
    if (pair != MPI_COMM_NULL) MPIX_Comm_revoke(pair);
    throw Error("a new process could not be admitted: " + reason);
  }
  if (own != nullptr) MPI_Send(&admitted, 1, MPI_BYTE, 1, answer_tag, pair);  // if it has died, connect() learns of it
  {
    const Deadline deadline(admission, Deadline::longest_of(living.rank(), living.size()));
    connect(merged->handle_);
  }
  return *merged;
}

}  // namespace dtrain::mpi
