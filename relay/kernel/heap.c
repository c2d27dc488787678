/* The heap of a process that stays for long.
 *
 * Facts (man 3 mallopt; glibc malloc/malloc.c and malloc/arena.c):
 * - glibc gives threads arenas of their own, eight a CPU, and a block goes back to the arena it came from. What one
 *   thread allocates and another one frees leaves a hole there that the next such block, from a third thread's arena,
 *   does not fill. CPython's table of interned strings is such a block: it is made anew, by whichever thread comes, as
 *   names come and go. Measured on two CPUs: 1 MB more, resident, in each of the arenas in turn, with no end in sight
 *   after 220,000 streams with a file each.
 * - Blocks from M_MMAP_THRESHOLD on are mapped, and given back at once. That threshold rises by itself to the size of
 *   the largest block that was freed, unless it was set. */
#include "calls.h"

#include <malloc.h>

#define MAPPED (256 << 10)      /* bytes from which on a block has a mapping of its own */
#define TRIMMED (512 << 10)     /* free bytes on top of the heap that are kept */

void relay_trim_heap(void)
{
#ifdef M_TRIM_THRESHOLD
    malloc_trim(0);
#endif
}

void relay_keep_heap_small(void)
{
#ifdef M_ARENA_MAX
    mallopt(M_ARENA_MAX, 1);
#endif
#if defined(M_MMAP_THRESHOLD) && defined(M_TRIM_THRESHOLD)
    mallopt(M_MMAP_THRESHOLD, MAPPED);
    mallopt(M_TRIM_THRESHOLD, TRIMMED);
#endif
}
