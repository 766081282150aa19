// SPDX-License-Identifier: Apache-2.0
// What of the engine is given any bytes: by libFuzzer, and in tests those that it has kept. None of it needs MPI.
#pragma once

#include <cstddef>
#include <span>

namespace dtrain::fuzz {

// Each does with the bytes what the engine does with them. What a sanitizer finds, or an exception, is a bug.

// A message from a rank of another node.
void control(std::span<const std::byte> bytes);
// What another rank of this node has in the pages that it shares.
void pages(std::span<const std::byte> bytes);
// Files of /proc and of control groups, introductions, the beginning of a long message.
void texts(std::span<const std::byte> bytes);

}  // namespace dtrain::fuzz
