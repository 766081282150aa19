// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Ends on each rank of `group` once all ranks have called it. Collective.
PreparedCall barrier(Group& group);

}  // namespace dtrain
