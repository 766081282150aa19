// SPDX-License-Identifier: Apache-2.0
#include "runtime/status.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

#include "at.hpp"

namespace dtrain {
namespace {

template <std::size_t N>
std::string text_of(const std::array<char, N>& characters) {
  return {characters.data(), std::ranges::find(characters, '\0')};
}

std::string time_of_day(std::int64_t ms) {
  const std::time_t seconds = ms / 1000;
  std::tm local{};
  localtime_r(&seconds, &local);
  char text[16];
  std::strftime(text, sizeof(text), "%H:%M:%S", &local);
  return text;
}

std::string where(const Place& place) {
  return text_of(place.call) + ", " + text_of(place.file) + ":" + std::to_string(place.line);
}

// "rank 1", "ranks 1 and 2", "ranks 1, 2 and 5".
std::string list(const std::vector<std::int64_t>& ranks) {
  std::string text = ranks.size() > 1 ? "ranks " : "rank ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) text += i + 1 < ranks.size() ? ", " : " and ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

// Ranks grouped by the text that describes them, in the order in which each text was first added.
class RanksByText {
 public:
  void add(const std::string& text, std::int64_t rank) {
    const auto entry = std::ranges::find(entries_, text, &Entry::first);
    if (entry == entries_.end()) entries_.push_back({text, {rank}});
    else entry->second.push_back(rank);
  }

  std::string text(const std::string& of_one, const std::string& of_many) const {
    std::string all;
    for (const auto& [text, ranks] : entries_) {
      all += (all.empty() ? "" : "; ") + list(ranks) + (ranks.size() > 1 ? of_many : of_one) + text;
    }
    return all;
  }

 private:
  using Entry = std::pair<std::string, std::vector<std::int64_t>>;
  std::vector<Entry> entries_;
};

std::string last_call(const Place& place) {
  if (place.since_ms == 0) return "has not called the trainer yet";
  if (place.is_inside != 0) return "is in " + where(place) + ", since " + time_of_day(place.since_ms);
  return "is in the script's own code since " + time_of_day(place.since_ms) + ", after " + where(place);
}

std::string what_of(const Snapshot& seen, const std::string& note) {
  switch (seen.state) {
    case State::running: return last_call(seen.place);
    case State::stopped: return "is stopped by a signal; it " + last_call(seen.place);
    case State::dead: return "is dead: killed, or ended without a message" + note + "; it " + last_call(seen.place);
    case State::ended: return "has ended, or closed its trainer; it " + last_call(seen.place);
    case State::silent:
      return "does not answer: it or its machine is stopped, or the network is cut" +
             (seen.place.since_ms != 0 ? "; it " + last_call(seen.place) : std::string());
  }
  return "";
}

}  // namespace

Origin Origin::own() {
  Origin origin{};
  gethostname(origin.host.data(), origin.host.size() - 1);
  struct stat status{};
  if (stat("/proc/self/ns/pid", &status) == 0) origin.pid_namespace = status.st_ino;
  origin.pid = getpid();
  return origin;
}

std::int64_t system_now_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
}

std::int64_t machine_now_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

State state_of_process(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (text.empty()) return access("/proc/self/stat", F_OK) == 0 ? State::dead : State::silent;
  return state_in_stat(text);
}

// The state follows the process's name, which is in parentheses. The name may itself hold parentheses and line ends.
State state_in_stat(std::string_view text) {
  const std::size_t end_of_name = text.rfind(')');
  const char letter = end_of_name < text.size() && text.size() - end_of_name > 2 ? text[end_of_name + 2] : '?';
  if (letter == 'T' || letter == 't') return State::stopped;
  return letter == 'Z' || letter == 'X' ? State::dead : State::running;
}

std::string cgroup_path(std::istream& cgroups, std::string_view start) {
  for (std::string line; std::getline(cgroups, line);) {
    const std::size_t found = line.find(start);
    if (found != std::string::npos) return line.substr(found + start.size());
  }
  return "";
}

int num_killed_in(std::istream& counts) {
  std::string key;
  for (int value = 0; counts >> key >> value;) {
    if (key == "oom_kill") return value;
  }
  return -1;
}

int num_killed_for_memory() {
  const auto count_in = [](const std::string& folder, std::string_view start, const std::string& name) {
    std::ifstream cgroups("/proc/self/cgroup");
    std::ifstream counts(folder + cgroup_path(cgroups, start) + name);
    return num_killed_in(counts);
  };
  const int count = count_in("/sys/fs/cgroup", "0::", "/memory.events");
  return count >= 0 ? count : count_in("/sys/fs/cgroup/memory", ":memory:", "/memory.oom_control");
}

std::string describe_stall(const std::vector<Snapshot>& snapshots, const std::vector<Origin>& origins,
                           const std::string& note) {
  std::string missing;
  RanksByText waiting;
  for (const Snapshot& seen : snapshots) {
    if (seen.waits()) {
      const std::string call = seen.wait.call.description();
      waiting.add(seen.place.is_inside != 0 ? where(seen.place) + " (" + call + ")" : call, seen.rank);
      continue;
    }
    const Origin& origin = at(origins, seen.rank);
    missing += (missing.empty() ? "rank " : "; rank ") + std::to_string(seen.rank) + " (" + text_of(origin.host) +
               ", process " + std::to_string(origin.pid) + ") " + what_of(seen, note);
  }
  const std::string those = waiting.text(" waits in ", " wait in ");
  if (missing.empty()) return "all ranks wait, but in different calls: " + those;
  return missing + (those.empty() ? "" : "; ") + those;
}

std::string describe_places(const std::vector<Snapshot>& snapshots) {
  RanksByText places;
  for (const Snapshot& seen : snapshots) {
    places.add(seen.place.since_ms == 0 ? "nothing is known" : where(seen.place), seen.rank);
  }
  return places.text(": ", ": ");
}

}  // namespace dtrain
