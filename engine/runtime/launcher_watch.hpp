// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include "memory/segment.hpp"

namespace dtrain {

// Ends this process when the launcher that started it is gone: when mpirun is killed, Open MPI's ranks would otherwise
// continue to run. Linux before 5.3 gives no notice of the end of a process, so it is looked for once a second there.
// Throws std::system_error if the process is gone already.
void end_with_launcher(pid_t launcher);

}  // namespace dtrain
