// Parts of a job on several threads: see pool.cpp.
#pragma once

// Calls part(data, i) once for every i from 0 to parts - 1, on at most that many threads, the caller's included.
extern "C" void blockpress_parallel(long parts, int threads, void (*part)(void*, long), void* data);

namespace {

// The same for anything callable with a number.
template <class Part>
inline void parallel(long parts, int threads, const Part& part) {
  blockpress_parallel(
      parts, threads, [](void* data, long i) { (*static_cast<const Part*>(data))(i); }, const_cast<Part*>(&part));
}

// Calls part(start, stop) for slices of rows: at most `most`, four per thread, so that the last one to finish is short.
template <class Part>
inline void share(long rows, long most, int threads, const Part& part) {
  long slices = threads <= 1 ? 1 : 4L * threads;
  slices = slices < most ? slices : most;
  slices = slices < rows ? slices : rows;
  if (slices <= 1) return part(0L, rows);
  parallel(slices, threads, [&](long i) { part(rows * i / slices, rows * (i + 1) / slices); });
}

}  // namespace
