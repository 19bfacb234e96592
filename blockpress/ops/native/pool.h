// Parts of a job on several threads: see pool.cpp.
#pragma once

// part(data, i) once for every i from 0 to parts - 1, on at most that many threads, the caller's among them.
extern "C" void blockpress_parallel(long parts, int threads, void (*part)(void*, long), void* data);

namespace {

// The same for anything that can be called with a number.
template <class Part>
inline void parallel(long parts, int threads, const Part& part) {
  blockpress_parallel(
      parts, threads, [](void* data, long i) { (*static_cast<const Part*>(data))(i); }, const_cast<Part*>(&part));
}

}  // namespace
