// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "collectives/group.hpp"

namespace dtrain {

// Ends on each rank of `group` once all have called it. Collective.
Task barrier(Group& group);

}  // namespace dtrain
