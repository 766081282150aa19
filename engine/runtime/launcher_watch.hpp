// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include "memory/segment.hpp"

namespace dtrain {

// Ends this process when the launcher that started it is gone: when mpirun is killed, Open MPI's ranks would otherwise
// continue to run. Throws std::system_error if the system cannot watch a process (Linux before 5.3).
void end_with_launcher(pid_t launcher);

}  // namespace dtrain
