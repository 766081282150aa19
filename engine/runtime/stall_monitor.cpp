// SPDX-License-Identifier: Apache-2.0
#include "runtime/stall_monitor.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <numeric>
#include <system_error>
#include <utility>

#include "at.hpp"

namespace dtrain {
namespace {

using std::chrono::milliseconds;

constexpr std::int64_t longest_between_looks_ms = 500;
// Time without a look after which a rank's monitor makes the rank silent, if nothing else is known about its process.
constexpr std::int64_t longest_beat_ms = 3000;
// Share of the time until a report that passes before the look, and share for the answers of other nodes.
constexpr double share_before_look = 0.7;
constexpr double share_for_answers = 0.2;
// Time that the launcher has to end the job after a death, before the survivors end it; and time that a rank has to end
// after an error that its script cannot receive, because user code does not return.
constexpr std::int64_t launcher_patience_ms = 2000;
constexpr std::int64_t error_patience_ms = 5000;
// Time after which ranks that survive deaths would have recovered, unless MPI is stuck.
constexpr std::int64_t recovery_patience_ms = 10000;

// Set by the one monitor of the process whose SIGTERM handler is installed.
std::atomic<StatusPage*> handler_page = nullptr;
std::atomic<int> handler_wake = -1;
std::atomic<pid_t> handler_pid = 0;
std::atomic<int> num_in_handler = 0;  // threads that may still use handler_page and handler_wake

void end_by_sigterm() {
  std::signal(SIGTERM, SIG_DFL);
  kill(getpid(), SIGTERM);
}

extern "C" void on_sigterm(int) {
  const int saved_errno = errno;
  ++num_in_handler;
  StatusPage* page = handler_page;
  if (getpid() != handler_pid || page == nullptr) {
    end_by_sigterm();  // a forked child has no monitor
  } else {
    page->end = End::terminated;
    const std::uint64_t one = 1;
    static_cast<void>(!write(handler_wake, &one, sizeof(one)));
  }
  --num_in_handler;
  errno = saved_errno;
}

Descriptor watch_process(const Origin& origin, const Origin& own) {
  errno = 0;
  if (origin.pid_namespace != own.pid_namespace) return Descriptor();
  return Descriptor(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(origin.pid), 0)));
}

bool is_lost(const Snapshot& seen) {
  return seen.state == State::dead || seen.state == State::stopped || seen.state == State::silent;
}

bool speaks_for_itself(const Snapshot& seen) { return seen.state == State::running || seen.state == State::ended; }

template <std::size_t N>
void copy_end(const std::string& text, std::array<char, N>& target) {
  const std::size_t length = std::min(text.size(), N - 1);
  text.copy(target.data(), length, text.size() - length);
}

}  // namespace

StallMonitor::StallMonitor(int rank, std::vector<Origin> origins, std::vector<StatusPage*> pages, Hooks hooks)
    : rank_(rank),
      origins_(std::move(origins)),
      pages_(std::move(pages)),
      hooks_(std::move(hooks)),
      own_(*at(pages_, rank)),
      killed_for_memory_at_start_(num_killed_for_memory()),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      heard_(pages_.size()) {
  if (!wake_) throw std::system_error(errno, std::generic_category(), "eventfd");
  for (int peer = 0; peer < static_cast<int>(pages_.size()); ++peer) {
    StatusPage* page = at(pages_, peer);
    if (page == nullptr || peer == rank_) continue;
    Descriptor process = watch_process(at(origins_, peer), at(origins_, rank_));
    const bool is_gone = !process && errno == ESRCH;
    neighbours_.push_back({peer, page, std::move(process), false, is_gone});
  }
  own_.beat_ms = machine_now_ms();
  // Handle SIGTERM, so that there is time to report a killed rank: launchers then send SIGTERM to the others.
  struct sigaction action{};
  StatusPage* nobody = nullptr;
  if (sigaction(SIGTERM, nullptr, &action) == 0 && action.sa_handler == SIG_DFL &&
      handler_page.compare_exchange_strong(nobody, &own_)) {
    handler_wake = wake_.get();
    handler_pid = getpid();
    action.sa_handler = on_sigterm;
    action.sa_flags = SA_RESTART;
    sigaction(SIGTERM, &action, nullptr);
  }
  thread_ = std::make_unique<std::thread>([this] { run(); });
  pthread_setname_np(thread_->native_handle(), "dtrain-stalls");
}

StallMonitor::~StallMonitor() {
  if (getpid() == at(origins_, rank_).pid) close();
  else static_cast<void>(thread_.release());  // the thread does not exist in a forked child
}

void StallMonitor::close() {
  End none = End::none;
  own_.end.compare_exchange_strong(none, End::closed);
  if (!thread_) return;
  stopping_ = true;
  const std::uint64_t one = 1;
  static_cast<void>(!write(wake_.get(), &one, sizeof(one)));
  thread_->join();
  thread_.reset();
  if (handler_page == &own_) {
    struct sigaction action{};
    if (sigaction(SIGTERM, nullptr, &action) == 0 && action.sa_handler == on_sigterm) std::signal(SIGTERM, SIG_DFL);
    handler_page = nullptr;
  }
  while (num_in_handler != 0) std::this_thread::yield();
  wake_ = Descriptor();
  for (Neighbour& neighbour : neighbours_) neighbour.process = Descriptor();
  if (own_.end == End::terminated) end_by_sigterm();
}

void StallMonitor::set_limits(std::optional<double> report_seconds, std::optional<double> timeout_seconds) {
  if (report_seconds) report_seconds_ = *report_seconds;
  if (timeout_seconds) timeout_seconds_ = *timeout_seconds;
}

void StallMonitor::take_settings(const StallMonitor& other) {
  set_limits(other.report_seconds_, other.timeout_seconds_);
  set_stack_signal(other.stack_signal_, other.stack_pipe_);
}

void StallMonitor::note_call(const std::string& call, const std::string& file, int line) {
  Place place{};
  copy_end(call, place.call);
  copy_end(file, place.file);
  place.since_ms = system_now_ms();
  place.line = line;
  place.is_inside = 1;
  own_.place.write(place);
}

void StallMonitor::note_return() {
  Place place = own_.place.read();
  place.since_ms = system_now_ms();
  place.is_inside = 0;
  own_.place.write(place);
}

void StallMonitor::note_failure() { own_.end = End::failed; }

void StallMonitor::begin_wait(std::span<const int> ranks, const Call& call) {
  const std::scoped_lock lock(mutex_);
  ++num_waits_;
  waited_for_.assign(ranks.begin(), ranks.end());
  if (call.collective >= Collective::send && call.root >= 0) {  // a message concerns two ranks
    waited_for_ = {rank_, at(ranks, call.root)};
  }
  std::ranges::sort(waited_for_);
  Call shown = call;
  if (call.root >= 0) shown.root = at(ranks, call.root);  // its number in the job, as of all ranks in a report
  own_.wait.write({shown, system_now_ms()});
}

void StallMonitor::end_wait() {
  const std::scoped_lock lock(mutex_);
  if (--num_waits_ == 0) own_.wait.write({});
}

void StallMonitor::hear(const Snapshot& seen) {
  const std::scoped_lock lock(mutex_);
  // A rank's own report counts for more than its neighbours' reports about it.
  auto& entry = at(heard_, seen.rank);
  if (!entry || !speaks_for_itself(*entry)) entry = seen;
}

void StallMonitor::note_wanted() { own_.num_wanted.fetch_add(1); }

Snapshot StallMonitor::see(const Neighbour& neighbour) const {
  const StatusPage& page = *neighbour.page;
  Snapshot seen{neighbour.rank, State::running, page.place.read(), page.wait.read()};
  if (page.end != End::none) {
    seen.state = State::ended;
  } else if (neighbour.is_dead) {
    seen.state = State::dead;
  } else {
    const Origin& origin = at(origins_, neighbour.rank);
    const bool is_visible = origin.pid_namespace == at(origins_, rank_).pid_namespace;
    seen.state = is_visible ? state_of_process(static_cast<pid_t>(origin.pid)) : State::silent;
    const bool is_alive = page.beat_ms > machine_now_ms() - longest_beat_ms;
    if (seen.state == State::silent && is_alive) seen.state = State::running;
    if (seen.state == State::running && !is_alive) seen.state = State::silent;
  }
  return seen;
}

std::vector<Snapshot> StallMonitor::seen_here() {
  const State own = own_.end == End::none ? State::running : State::ended;
  std::vector<Snapshot> all{{rank_, own, own_.place.read(), own_.wait.read()}};
  for (const Neighbour& neighbour : neighbours_) {
    const Snapshot seen = see(neighbour);
    if (!speaks_for_itself(seen)) all.push_back(seen);
  }
  return all;
}

void StallMonitor::run() {
  while (!stopping_) {
    std::vector<pollfd> events{{.fd = wake_.get(), .events = POLLIN, .revents = 0},
                               {.fd = stack_pipe_, .events = POLLIN, .revents = 0}};
    for (const Neighbour& neighbour : neighbours_) {
      if (neighbour.process && !neighbour.is_dead) events.push_back({neighbour.process.get(), POLLIN, 0});
    }
    const auto between = std::min(longest_between_looks_ms, static_cast<std::int64_t>(report_seconds_ * 50));
    poll(events.data(), events.size(), static_cast<int>(std::max<std::int64_t>(between, 1)));
    look();
    show_frames();
  }
}

void StallMonitor::look() {
  own_.beat_ms = machine_now_ms();
  report_dead();
  if (survives_deaths()) lose_dead();
  if (own_.end == End::terminated) {
    end_by_sigterm();
    return;
  }
  look_at_wait();
  const std::uint32_t wanted = own_.num_wanted;
  if (wanted != wanted_seen_) {
    wanted_seen_ = wanted;
    show_stack();
  }
  if (ending_since_ms_ && machine_now_ms() - *ending_since_ms_ > error_patience_ms) {
    say("rank " + std::to_string(rank_) +
        " ends: its script did not call the trainer again, which would have raised the error");
    _exit(1);
  }
}

void StallMonitor::report_dead() {
  std::vector<Snapshot> dead;
  for (Neighbour& neighbour : neighbours_) {
    pollfd event{.fd = neighbour.process.get(), .events = POLLIN, .revents = 0};
    const bool has_gone = neighbour.is_gone || (neighbour.process && poll(&event, 1, 0) > 0);
    if (neighbour.is_dead || !has_gone) continue;
    neighbour.is_dead = true;
    if (neighbour.page->end == End::none) dead.push_back(see(neighbour));
  }
  // If the other ranks survive, one report is enough.
  const bool is_first = std::ranges::all_of(neighbours_, [this](const Neighbour& neighbour) {
    return neighbour.is_dead || neighbour.rank > rank_;
  });
  if (!dead.empty() && (is_first || !survives_deaths())) say(describe_stall(dead, origins_, memory_note()));
}

// Begins the recovery if a neighbour was killed. Only a death by a signal is survived: a rank that raises ends the job.
void StallMonitor::lose_dead() {
  const auto was_killed = [](const Neighbour& neighbour) {
    const End end = neighbour.page->end;
    return neighbour.is_dead && (end == End::none || end == End::terminated);
  };
  if (std::ranges::any_of(neighbours_, was_killed)) hooks_.lose_rank();
}

std::string StallMonitor::memory_note() const {
  const int killed = num_killed_for_memory();
  if (killed < 0 || killed_for_memory_at_start_ < 0 || killed <= killed_for_memory_at_start_) return "";
  return " (the out-of-memory killer has ended " + std::to_string(killed - killed_for_memory_at_start_) +
         " of its machine's processes in this cgroup since the start)";
}

std::string StallMonitor::describe_places() { return dtrain::describe_places(collect(everyone())); }

bool StallMonitor::is_rank_lost() { return std::ranges::any_of(collect(everyone()), is_lost); }

std::vector<int> StallMonitor::living() {
  std::vector<int> ranks = everyone();
  for (const Neighbour& neighbour : neighbours_) {
    if (see(neighbour).state == State::dead) std::erase(ranks, neighbour.rank);
  }
  return ranks;
}

bool StallMonitor::are_all_in_set_ups() {
  if (std::ranges::find(pages_, nullptr) != pages_.end()) return false;
  return std::ranges::all_of(neighbours_, [this](const Neighbour& neighbour) {
    const Snapshot seen = see(neighbour);
    return seen.state == State::dead || (seen.waits() && seen.wait.call.collective == Collective::set_up);
  });
}

std::vector<int> StallMonitor::everyone() const {
  std::vector<int> ranks(pages_.size());
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

std::vector<Snapshot> StallMonitor::collect(std::span<const int> ranks) {
  const std::scoped_lock asking(collect_mutex_);
  std::vector<Snapshot> snapshots;
  std::vector<int> elsewhere;
  for (const int rank : ranks) {
    if (at(pages_, rank) == nullptr) elsewhere.push_back(rank);
  }
  if (!elsewhere.empty()) {
    {
      const std::scoped_lock lock(mutex_);
      for (auto& entry : heard_) entry.reset();
    }
    for (const int rank : elsewhere) hooks_.ask(rank, false);
    const auto deadline = machine_now_ms() + static_cast<std::int64_t>(1000 * share_for_answers * report_seconds_);
    const auto all_heard = [&] {
      const std::scoped_lock lock(mutex_);
      return std::ranges::all_of(elsewhere, [&](int rank) {
        const auto& entry = at(heard_, rank);
        return entry && speaks_for_itself(*entry);
      });
    };
    while (!all_heard() && machine_now_ms() < deadline && !stopping_) std::this_thread::sleep_for(milliseconds(10));
  }
  for (const int rank : ranks) {
    if (rank == rank_) {
      snapshots.push_back({rank_, State::running, own_.place.read(), own_.wait.read()});
      continue;
    }
    const auto neighbour = std::ranges::find(neighbours_, rank, &Neighbour::rank);
    const std::scoped_lock lock(mutex_);
    const auto& entry = at(heard_, rank);
    snapshots.push_back(neighbour != neighbours_.end() ? see(*neighbour)
                        : entry                        ? *entry
                                                       : Snapshot{rank, State::silent, {}, {}});
  }
  return snapshots;
}

void StallMonitor::look_at_wait() {
  const Wait wait = own_.wait.read();
  const double seconds = 1e-3 * static_cast<double>(system_now_ms() - wait.since_ms);
  if (wait.since_ms != wait_reported_) {
    // The reported wait has ended by itself, so the next one must be longer to be reported.
    if (!last_text_.empty()) patience_seconds_ *= 2;
    wait_reported_ = wait.since_ms;
    last_text_.clear();
    seen_text_.clear();
    silent_since_ms_.reset();
  }
  if (wait.since_ms == 0 || seconds < share_before_look * report_seconds_) return;
  std::vector<int> ranks;
  {
    const std::scoped_lock lock(mutex_);
    ranks = waited_for_;
  }
  const std::vector<Snapshot> snapshots = collect(ranks);
  if (own_.wait.read().since_ms != wait.since_ms) return;  // the wait was over before all had answered
  const bool is_slow_only = std::ranges::none_of(snapshots, is_lost);
  if (is_slow_only && seconds < patience_seconds_) return;
  const std::string text = describe_stall(snapshots, origins_, memory_note());
  // A second report is made only if two looks agree: the missing rank may just be on its way here.
  const bool is_lasting = last_text_.empty() || text == seen_text_;
  seen_text_ = text;
  if (text != last_text_ && is_lasting) {
    say(text);
    last_text_ = text;
    patience_seconds_ = std::max(patience_seconds_, static_cast<double>(report_seconds_));
    for (const Snapshot& seen : snapshots) {
      if (seen.state != State::running || seen.waits()) continue;
      StatusPage* page = at(pages_, seen.rank);
      if (page != nullptr) page->num_wanted.fetch_add(1);
      else hooks_.ask(static_cast<int>(seen.rank), true);
    }
  }
  end_silent(snapshots, text);
}

// Ends this rank's part of the job if another rank will never arrive.
void StallMonitor::end_silent(const std::vector<Snapshot>& snapshots, const std::string& text) {
  const bool is_any_dead = std::ranges::find(snapshots, State::dead, &Snapshot::state) != snapshots.end();
  if (std::ranges::none_of(snapshots, is_lost)) {
    silent_since_ms_.reset();
    return;
  }
  const std::int64_t now = machine_now_ms();
  if (!silent_since_ms_) silent_since_ms_ = now;
  const std::int64_t after_death = survives_deaths() ? recovery_patience_ms : launcher_patience_ms;
  const auto limit = is_any_dead ? after_death : static_cast<std::int64_t>(1000 * timeout_seconds_);
  if (ending_since_ms_ || now - *silent_since_ms_ < limit) return;
  ending_since_ms_ = now;
  // Runs in its own thread: the thread that drives the engine may never return from MPI.
  std::thread(hooks_.fail, text + (is_any_dead ? "" : ". The timeout for silent ranks is over (DTRAIN_STALL_TIMEOUT)"))
      .detach();
}

void StallMonitor::show_stack() {
  if (stack_signal_ == 0) return;
  const Place place = own_.place.read();
  if (place.since_ms == stack_shown_for_ms_) return;
  stack_shown_for_ms_ = place.since_ms;
  say("rank " + std::to_string(rank_) + ", for which others wait, is here:");
  syscall(SYS_tgkill, getpid(), getpid(), stack_signal_.load());  // the main thread's ID is the process's
}

// Prints the stack that has arrived in the pipe, without the frames of importlib: it has five for each module of a
// chain of imports, so the modules' own frames could not be seen between them.
void StallMonitor::show_frames() {
  std::array<char, 4096> bytes;
  while (true) {
    const ssize_t count = read(stack_pipe_, bytes.data(), bytes.size());
    if (count <= 0) break;
    frames_.append(bytes.data(), static_cast<std::size_t>(count));
  }
  std::string shown;
  std::size_t start = 0;
  for (std::size_t end; (end = frames_.find('\n', start)) != std::string::npos; start = end + 1) {
    const std::string line = frames_.substr(start, end + 1 - start);
    if (line.find("<frozen importlib") == std::string::npos) shown += line;
  }
  frames_.erase(0, start);
  if (!shown.empty()) static_cast<void>(!write(STDERR_FILENO, shown.data(), shown.size()));
}

// Writes the line in one piece, so that the lines of several ranks do not mix.
void StallMonitor::say(const std::string& text) const {
  const std::string line = "distributed_trainer: " + text + "\n";
  static_cast<void>(!write(STDERR_FILENO, line.data(), line.size()));
}

}  // namespace dtrain
