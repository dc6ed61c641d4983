/*
 * Requests in, answers out, over the process's first two file descriptors.
 *
 * Both directions are buffered, so that a batch of requests costs a few system calls. Answers are written
 * when the buffer is full and before waiting for input; the host must read while it writes.
 */
#include "redo.h"

#include <fcntl.h>
#include <unistd.h>

#define BUFFER_SIZE_INITIAL (1u << 20)
#define BUFFER_SIZE_KEPT (8u << 20)

#define EXIT_END_OF_INPUT 0
#define EXIT_OUTPUT_FAILED 3
#define EXIT_INPUT_FAILED 4

typedef struct AnswerHead
{
    uint32 status, length;
} AnswerHead;

static int input_fd, output_fd;
static char *input;
static size_t input_start, input_end, input_capacity;
static char *output;
static size_t output_size;

/* Moves the protocol away from stdin and stdout, which PostgreSQL may print to. */
void
protocol_start(void)
{
    int nothing;

    input_fd = dup(STDIN_FILENO);
    output_fd = dup(STDOUT_FILENO);
    nothing = open("/dev/null", O_RDONLY);
    if (input_fd < 0 || output_fd < 0 || nothing < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0 ||
        dup2(nothing, STDIN_FILENO) < 0)
        elog(FATAL, "cannot set up the redo worker's pipes: %m");
    close(nothing);
    input_capacity = BUFFER_SIZE_INITIAL;
    input = malloc(input_capacity);
    output = malloc(BUFFER_SIZE_INITIAL);
    if (input == NULL || output == NULL)
        elog(FATAL, "out of memory");
}

void
protocol_flush(void)
{
    size_t written = 0;

    while (written < output_size)
    {
        ssize_t count = write(output_fd, output + written, output_size - written);

        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            _exit(EXIT_OUTPUT_FAILED);
        written += count;
    }
    output_size = 0;
}

static void
append(const void *data, size_t size)
{
    if (output_size + size > BUFFER_SIZE_INITIAL)
        protocol_flush();
    memcpy(output + output_size, data, size);
    output_size += size;
}

/* `size` is at most a page or an error text. */
void
protocol_answer(uint32 status, const void *data, size_t size)
{
    AnswerHead head = {status, (uint32) size};

    append(&head, sizeof head);
    if (size > 0)
        append(data, size);
}

/* Makes room for `size` bytes in all; gives the memory of an unusually long request back. */
static void
reserve(size_t size)
{
    if (input_start > 0)
    {
        memmove(input, input + input_start, input_end - input_start);
        input_end -= input_start;
        input_start = 0;
    }
    if (size > input_capacity || (input_capacity > BUFFER_SIZE_KEPT && Max(size, input_end) < BUFFER_SIZE_INITIAL))
    {
        size_t capacity = size > BUFFER_SIZE_INITIAL ? size : BUFFER_SIZE_INITIAL;
        char *larger = realloc(input, capacity);

        if (larger == NULL)
            _exit(EXIT_INPUT_FAILED);
        input = larger;
        input_capacity = capacity;
    }
}

char *
protocol_read(size_t size)
{
    char *data;

    if (input_start + size > input_capacity || input_start == input_end)
        reserve(size);
    while (input_end - input_start < size)
    {
        ssize_t count;

        protocol_flush();
        alarm(0); /* waiting for work may take for ever, working may not */
        count = read(input_fd, input + input_end, input_capacity - input_end);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            _exit(count == 0 ? EXIT_END_OF_INPUT : EXIT_INPUT_FAILED);
        alarm(REQUEST_SECONDS_MAX);
        input_end += count;
    }
    data = input + input_start;
    input_start += size;
    return data;
}
