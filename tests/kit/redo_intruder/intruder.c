/*
 * What somebody would have who broke redo: any system call with any arguments, from inside a redo worker.
 *
 * Linked into a worker for tests in the place of the request that masks a page (--wrap=replay_mask). A request
 * whose resource manager is INTRUDER is a system call; all others go to the real function.
 *
 *   u32 INTRUDER, u32 offsets: bit N says that argument N is an offset into the bytes that follow
 *   i64 number, i64 arguments[6], bytes
 *
 * Answer: i64 result, or minus errno; the bytes as they are afterwards.
 */
#include "redo.h"

#include <sys/syscall.h>
#include <unistd.h>

#define INTRUDER 0xE7C1AE27u
#define ARGUMENT_COUNT 6

typedef struct Attempt
{
    uint32 intruder, offsets;
    int64 number, arguments[ARGUMENT_COUNT];
} Attempt;

extern void __real_replay_mask(const char *request, size_t size);
extern void __wrap_replay_mask(const char *request, size_t size);

void
__wrap_replay_mask(const char *request, size_t size)
{
    Attempt attempt;
    char *answer;
    int64 *arguments = attempt.arguments;
    int64 result;

    memcpy(&attempt, request, Min(size, sizeof attempt));
    if (size < sizeof attempt || attempt.intruder != INTRUDER)
    {
        __real_replay_mask(request, size);
        return;
    }
    size -= sizeof attempt;
    answer = palloc(sizeof result + size);
    memcpy(answer + sizeof result, request + sizeof attempt, size);
    for (int index = 0; index < ARGUMENT_COUNT; index++)
        if (attempt.offsets & 1u << index)
            arguments[index] += (int64) (uintptr_t) (answer + sizeof result);
    result = syscall(attempt.number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
    if (result < 0)
        result = -errno;
    memcpy(answer, &result, sizeof result);
    protocol_answer(ANSWER_PAGE, answer, sizeof result + size);
}
