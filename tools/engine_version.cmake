# SPDX-License-Identifier: Apache-2.0
# Writes OUTPUT, a header that names the sources in the folder ENGINE by their digest: modules that differ in nothing
# but who compiled them are of one version. Tests are no part of it.
file(GLOB_RECURSE sources RELATIVE ${ENGINE} ${ENGINE}/*.cpp ${ENGINE}/*.hpp)
list(FILTER sources EXCLUDE REGEX "^(fuzz|tests)/")
list(SORT sources)
set(digests "")
foreach(source IN LISTS sources)
  file(SHA256 ${ENGINE}/${source} digest)
  string(APPEND digests "${source} ${digest}\n")
endforeach()
string(SHA256 digest "${digests}")
string(SUBSTRING ${digest} 0 12 digest)
file(WRITE ${OUTPUT} "#pragma once\n#define ENGINE_VERSION \"${digest}\"\n")
