// SPDX-License-Identifier: Apache-2.0
// Channel for messages between ranks on different nodes about a group that does not make progress. Within a node, ranks
// see each other's state in shared memory.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "mpi/mailbox.hpp"
#include "runtime/driver.hpp"
#include "runtime/stall_monitor.hpp"

namespace dtrain {

struct ControlMessage;

class ControlChannel {
 public:
  // `mailbox`: over all ranks and synchronous; null if all ranks are on one node, and then nothing is sent.
  // `node_of_rank`: the node number of each rank. `survives_deaths`: a send that fails is no error, since Recovery
  // looks for the death of its receiver.
  ControlChannel(Driver& driver, std::unique_ptr<mpi::Mailbox> mailbox, std::vector<int> node_of_rank,
                 bool survives_deaths);

  // Makes rank `peer` of another node report its own and its neighbours' state; `is_wanted`: others wait for it. Any
  // thread.
  void ask(int peer, bool is_wanted);
  // Reads the messages of other nodes, passes them to the groups and to `monitor`, and answers them; at most every 10
  // ms. Called by the engine thread.
  void answer(StallMonitor& monitor);

  // Describes what `operation` of `group` waits for. Asks ranks on other nodes where they are, and waits up to a second
  // for their answers. Local. Any thread.
  std::string describe_wait(Group& group, const Operation& operation);
  // Makes this rank leave `group` with an error: its operations fail with `reason`, and so do all operations of the
  // other ranks in this group, now and later. Local. Any thread.
  void give_up(Group& group, const std::string& reason);
  // Tells other nodes that this rank leaves `group` in good order, and how many of its collectives it has completed.
  // The pause keeps that number from changing.
  void announce_leaving(const Driver::Pause& pause, const Group& group);

  // Receives all messages before any rank ends, since Open MPI aborts a rank that still sends to one that has ended. It
  // waits for no more than MPI's own end does. Collective over all ranks. If not `is_orderly`, some rank may never
  // arrive, and this function gives up after a second.
  void meet_at_end(StallMonitor& monitor, bool is_orderly);
  // Fails all waits and calls in the mailbox's communicator, now and later, on every rank. Local.
  void revoke();

 private:
  void collect(StallMonitor& monitor);
  void answer_about_group(const ControlMessage& message);
  void post(const ControlMessage& message, int destination);
  void post_to_other_nodes(const Group& group, const ControlMessage& message);

  Driver& driver_;
  const std::unique_ptr<mpi::Mailbox> mailbox_;
  const std::vector<int> node_of_rank_;
  const bool survives_deaths_;
  std::chrono::steady_clock::time_point next_look_;  // used by the engine thread only
};

}  // namespace dtrain
