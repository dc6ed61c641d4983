"""Work that goes on for long lets others have its core: readers wait for it a millisecond, not a time slice.

A thread that computes keeps its core up to the next tick of the kernel (4 ms at 250 Hz), whoever has woken up
meanwhile, and on a machine of few cores that is what a slow read waits for. A lower priority would not do:
the kernel might put the thread aside while it holds the GIL. Here it does not hold it.
"""

cdef extern from "sched.h" nogil:
    int sched_yield()


def give_way() -> None:
    """Returns when threads and processes of our session that waited for this core have had their turn."""
    with nogil:
        sched_yield()
