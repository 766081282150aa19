// SPDX-License-Identifier: Apache-2.0
// Indexing by the signed numbers that ranks and nodes are in MPI. Every folder may include this.
#pragma once

#include <cassert>
#include <concepts>
#include <cstddef>
#include <utility>

namespace dtrain {

// Returns element number `index` of a vector, array or span. Like operator[], it is not checked in a release.
template <class Range>
constexpr decltype(auto) at(Range&& range, std::signed_integral auto index) {
  assert(index >= 0);
  return std::forward<Range>(range)[static_cast<std::size_t>(index)];
}

}  // namespace dtrain
