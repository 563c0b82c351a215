// Large outputs on the CPU: huge pages, and from which size on they are worth a thought.
#pragma once

#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dde_fast {

// From here on malloc maps fresh pages for every tensor, and no cache holds one; below, malloc gives
// back pages that were used, and takes them again.
constexpr int64_t LARGE_BYTES = int64_t{32} << 20;

// Before the first write to a large new tensor: asks for 2 MiB pages, as torch's own allocator does
// under THP_MEM_ALLOC_ENABLE. A fault per 4 KiB page costs more than computing what goes there.
// A wish: where the kernel refuses, nothing changes.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(PAGE - 1);
  if (bytes >= LARGE_BYTES) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace dde_fast
