// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include "memory/segment.hpp"

namespace dtrain {

// Ends this process when the launcher that started it is gone: a killed mpirun leaves Open MPI's ranks running.
// Throws std::system_error where the system can't watch a process (Linux before 5.3).
void end_with_launcher(pid_t launcher);

}  // namespace dtrain
