/* Client of the page service (docs/architecture/interfaces.md): one connection a process, opened at its first miss.
 *
 *   u32 length, u8 type, body
 *   H hello ->  <- h     G get pages ->  <- g pages | e error
 *
 * All requests of one attempt are sent at once and answered in any order. Whatever goes wrong closes the connection, so
 * that an answer to an abandoned request can never be taken for another's.
 *
 * Not here: repeating an attempt, and giving up (hydration.c, patience.c).
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>

#define PROTOCOL_VERSION 1
#define CONNECT_LIMIT_NS 5000000000ull
#define SILENCE_LIMIT_NS 15000000000ull
#define ERROR_TEXT_MAX 192u
#define FRAME_SIZE_MAX (16u << 20)

enum error_code { ERROR_RETRYABLE = 1, ERROR_REFUSED = 2, ERROR_FENCED = 3, ERROR_CORRUPTION = 4 };

struct frame_head {
    uint32_t length;
    uint8_t type;
} __attribute__((packed));

struct hello {
    struct frame_head head;
    uint16_t version;
    uint16_t token_size;
    uint8_t tenant[16];
    uint8_t timeline[16];
} __attribute__((packed));

struct hello_ok {
    uint16_t version;
    uint16_t unused;
    uint32_t blocks_max;
} __attribute__((packed));

struct get_pages {
    struct frame_head head;
    uint64_t id;
    uint64_t lsn;
    uint64_t not_modified_since;
    uint8_t kind;
    uint8_t fork;
    uint16_t unused;
    uint32_t space;
    uint32_t database;
    uint32_t relation;
    uint32_t block;
    uint32_t count;
} __attribute__((packed));

struct pages_head {
    uint64_t id;
    uint32_t count;
} __attribute__((packed));

struct error_head {
    uint64_t id;
    uint16_t code;
    uint16_t unused;
} __attribute__((packed));

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the protocol's integers are this machine's");

static struct {
    int fd;
    int owner; /* a descriptor inherited over fork belongs to the parent */
    uint32_t generation;
    uint32_t blocks_max;
    uint64_t last_id;
    bool busy; /* set while a request is out: found set, a handler left the last one in the middle */
} connection = {.fd = -1};

static char pages_buffer[RUN_BLOCKS_MAX * BLOCK_SIZE] __attribute__((aligned(4096)));

struct attempt {
    const struct arena_settings *settings;
    struct patience *patience;
    char *reason;
    uint64_t limit_ns;
};

static void disconnect(void)
{
    if (connection.fd >= 0)
        system_close(connection.fd);
    connection.fd = -1;
    connection.busy = false;
}

static bool fail(struct attempt *attempt, const char *what, const char *why)
{
    snprintf(attempt->reason, REASON_SIZE, "%s: %s", what, why);
    return false;
}

static bool wait_for(struct attempt *attempt, short events, const char *what)
{
    int ready = wait_ready(connection.fd, events, attempt->limit_ns, attempt->patience,
                           attempt->settings->connection_generation);
    if (ready > 0)
        return true;
    return fail(attempt, what, ready == 0 ? "no answer in time" : "interrupted");
}

static bool send_all(struct attempt *attempt, const void *bytes, size_t size)
{
    const char *next = bytes;
    while (size > 0) {
        ssize_t sent = send(connection.fd, next, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            next += sent;
            size -= (size_t)sent;
        } else if (sent < 0 && errno == EAGAIN) {
            if (!wait_for(attempt, POLLOUT, "sending"))
                return false;
        } else if (errno != EINTR) {
            return fail(attempt, "sending", strerror(errno));
        }
    }
    return true;
}

static bool receive_all(struct attempt *attempt, void *bytes, size_t size)
{
    char *next = bytes;
    while (size > 0) {
        ssize_t got = recv(connection.fd, next, size, MSG_DONTWAIT);
        if (got > 0) {
            next += got;
            size -= (size_t)got;
            attempt->limit_ns = system_now_ns() + SILENCE_LIMIT_NS;
        } else if (got == 0) {
            return fail(attempt, "receiving", "the page server closed the connection");
        } else if (errno == EAGAIN) {
            if (!wait_for(attempt, POLLIN, "receiving"))
                return false;
        } else if (errno != EINTR) {
            return fail(attempt, "receiving", strerror(errno));
        }
    }
    return true;
}

union any_address {
    struct sockaddr any;
    struct sockaddr_un local;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

/* Size of the socket address, or 0 if the text is not one of the three forms of arena_settings. */
static socklen_t parse_address(const char *text, union any_address *address)
{
    char host[ARENA_ADDRESS_SIZE];
    memset(address, 0, sizeof *address);
    if (text[0] == '/') {
        if (strlen(text) >= sizeof address->local.sun_path)
            return 0;
        address->local.sun_family = AF_UNIX;
        strcpy(address->local.sun_path, text);
        return sizeof address->local;
    }
    const char *colon = strrchr(text, ':');
    if (colon == NULL || colon == text)
        return 0;
    size_t size = (size_t)(colon - text);
    in_port_t port = htons((uint16_t)atoi(colon + 1));
    bool is_v6 = text[0] == '[' && text[size - 1] == ']';
    memcpy(host, text + is_v6, size - 2 * is_v6);
    host[size - 2 * is_v6] = '\0';
    if (is_v6) {
        address->v6.sin6_family = AF_INET6;
        address->v6.sin6_port = port;
        return inet_pton(AF_INET6, host, &address->v6.sin6_addr) == 1 ? sizeof address->v6 : 0;
    }
    address->v4.sin_family = AF_INET;
    address->v4.sin_port = port;
    return inet_pton(AF_INET, host, &address->v4.sin_addr) == 1 ? sizeof address->v4 : 0;
}

static bool dial(struct attempt *attempt)
{
    union any_address address;
    int one = 1, error = 0;
    socklen_t error_size = sizeof error, size = parse_address(attempt->settings->address, &address);
    if (size == 0)
        return fail(attempt, "connecting", "the address is malformed");
    int fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fail(attempt, "connecting", strerror(errno));
    connection.fd = system_move_up(fd);
    if (connect(connection.fd, &address.any, size) < 0) {
        if (errno != EINPROGRESS && errno != EINTR)
            return fail(attempt, "connecting", strerror(errno));
        if (!wait_for(attempt, POLLOUT, "connecting"))
            return false;
        if (getsockopt(connection.fd, SOL_SOCKET, SO_ERROR, &error, &error_size) < 0 || error != 0)
            return fail(attempt, "connecting", strerror(error != 0 ? error : errno));
    }
    if (address.any.sa_family != AF_UNIX)
        setsockopt(connection.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return true;
}

/* Reads an error frame's body behind its head; the code, or 0 if the frame cannot be read. */
static uint16_t receive_error(struct attempt *attempt, uint32_t body, uint64_t *id)
{
    struct error_head head;
    char text[ERROR_TEXT_MAX + 1], rest[1024];
    if (body < sizeof head) {
        fail(attempt, "receiving", "malformed error frame");
        return 0;
    }
    if (!receive_all(attempt, &head, sizeof head))
        return 0;
    uint32_t size = body - (uint32_t)sizeof head, kept = size < ERROR_TEXT_MAX ? size : ERROR_TEXT_MAX;
    if (!receive_all(attempt, text, kept))
        return 0;
    for (uint32_t left = size - kept, part; left > 0; left -= part) {
        part = left < sizeof rest ? left : (uint32_t)sizeof rest;
        if (!receive_all(attempt, rest, part))
            return 0;
    }
    for (uint32_t index = 0; index < kept; index++)
        if ((unsigned char)text[index] < ' ')
            text[index] = ' '; /* one line in the log */
    text[kept] = '\0';
    snprintf(attempt->reason, REASON_SIZE, "page server error %u: %s", head.code, text);
    *id = head.id;
    return head.code != 0 ? head.code : ERROR_RETRYABLE;
}

static bool receive_head(struct attempt *attempt, struct frame_head *head)
{
    if (!receive_all(attempt, head, sizeof *head))
        return false;
    if (head->length == 0 || head->length > FRAME_SIZE_MAX)
        return fail(attempt, "receiving", "malformed frame");
    return true;
}

static enum page_result greet(struct attempt *attempt)
{
    const struct arena_settings *settings = attempt->settings;
    struct hello hello = {.version = PROTOCOL_VERSION, .token_size = (uint16_t)settings->token_size};
    struct hello_ok answer;
    struct frame_head head;
    uint64_t id;
    hello.head = (struct frame_head){(uint32_t)(sizeof hello - 4 + settings->token_size), 'H'};
    memcpy(hello.tenant, settings->tenant, sizeof hello.tenant);
    memcpy(hello.timeline, settings->timeline, sizeof hello.timeline);
    if (!send_all(attempt, &hello, sizeof hello) || !send_all(attempt, settings->token, settings->token_size) ||
        !receive_head(attempt, &head))
        return PAGES_RETRY;
    if (head.type == 'e') {
        uint16_t code = receive_error(attempt, head.length - 1, &id);
        return code == 0 || code == ERROR_RETRYABLE ? PAGES_RETRY : PAGES_REFUSED;
    }
    if (head.type != 'h' || head.length != 1 + sizeof answer) {
        fail(attempt, "greeting", "malformed answer");
        return PAGES_RETRY;
    }
    if (!receive_all(attempt, &answer, sizeof answer))
        return PAGES_RETRY;
    if (answer.version != PROTOCOL_VERSION || answer.blocks_max == 0) {
        fail(attempt, "greeting", "the page server speaks another version");
        return PAGES_REFUSED;
    }
    connection.blocks_max = answer.blocks_max;
    return PAGES_DELIVERED;
}

static enum page_result connect_and_greet(struct attempt *attempt)
{
    attempt->limit_ns = system_now_ns() + CONNECT_LIMIT_NS;
    connection.owner = system_getpid();
    connection.generation = attempt->settings->connection_generation;
    COUNT(connections, 1);
    enum page_result result = dial(attempt) ? greet(attempt) : PAGES_RETRY;
    if (result != PAGES_DELIVERED)
        disconnect();
    return result;
}

/* The runs that are sent now get ids first_id + index. */
static bool send_requests(struct attempt *attempt, const struct page_request *request, uint64_t first_id)
{
    struct get_pages frames[RUNS_MAX];
    const struct arena_file *file = request->file;
    uint64_t evicted_lsn = __atomic_load_n(&file->evicted_lsn, __ATOMIC_SEQ_CST);
    uint32_t count = 0;
    for (uint32_t index = 0; index < request->run_count; index++) {
        const struct run *run = &request->runs[index];
        if (run->done)
            continue;
        frames[count++] = (struct get_pages){
            .head = {sizeof(struct get_pages) - 4, 'G'},
            .id = first_id + index,
            .lsn = attempt->settings->lsn,
            .not_modified_since = attempt->settings->not_modified_since > evicted_lsn
                                      ? attempt->settings->not_modified_since
                                      : evicted_lsn,
            .kind = file->kind,
            .fork = file->fork,
            .space = file->space,
            .database = file->database,
            .relation = file->relation,
            .block = file->first_block + run->block,
            .count = run->count,
        };
    }
    return send_all(attempt, frames, count * sizeof *frames);
}

/* The run that an answer's id names; NULL: none that is out. */
static struct run *run_of(const struct page_request *request, uint64_t first_id, uint64_t id)
{
    if (id < first_id || id - first_id >= request->run_count || request->runs[id - first_id].done)
        return NULL;
    return &request->runs[id - first_id];
}

static enum page_result receive_pages(struct attempt *attempt, const struct page_request *request, uint64_t first_id,
                                      uint32_t length)
{
    struct pages_head head;
    if (length < 1 + sizeof head) {
        fail(attempt, "receiving", "malformed pages frame");
        return PAGES_RETRY;
    }
    if (!receive_all(attempt, &head, sizeof head))
        return PAGES_RETRY;
    struct run *run = run_of(request, first_id, head.id);
    if (run == NULL || head.count != run->count || length != 1 + sizeof head + (uint64_t)head.count * BLOCK_SIZE) {
        fail(attempt, "receiving", "an answer that does not fit the request");
        return PAGES_RETRY;
    }
    if (!receive_all(attempt, pages_buffer, (size_t)run->count * BLOCK_SIZE))
        return PAGES_RETRY;
    if (!request->sink(request->context, run, pages_buffer))
        return PAGES_GIVEN_UP;
    run->done = true;
    return PAGES_DELIVERED;
}

static enum page_result receive_refusal(struct attempt *attempt, const struct page_request *request, uint64_t first_id,
                                        uint32_t length)
{
    uint64_t id;
    uint16_t code = receive_error(attempt, length - 1, &id);
    struct run *run = code == 0 || id == 0 ? NULL : run_of(request, first_id, id);
    if (code == 0)
        return PAGES_RETRY;
    if (run == NULL)
        return code == ERROR_RETRYABLE || id != 0 ? PAGES_RETRY : PAGES_REFUSED;
    if (run != &request->runs[0]) {
        run->done = true; /* a hint that the server does not want to serve is no loss */
        return PAGES_DELIVERED;
    }
    return code == ERROR_RETRYABLE ? PAGES_RETRY : PAGES_REFUSED;
}

static enum page_result receive_answers(struct attempt *attempt, const struct page_request *request, uint64_t first_id,
                                        uint32_t outstanding)
{
    for (; outstanding > 0; outstanding--) {
        struct frame_head head;
        enum page_result result = PAGES_RETRY;
        if (!receive_head(attempt, &head))
            return result;
        if (head.type == 'g')
            result = receive_pages(attempt, request, first_id, head.length);
        else if (head.type == 'e')
            result = receive_refusal(attempt, request, first_id, head.length);
        else
            fail(attempt, "receiving", "a frame of an unknown type");
        if (result != PAGES_DELIVERED)
            return result;
    }
    return PAGES_DELIVERED;
}

/* Cuts runs to what the server sends at once; who needs the rest asks again. The number of requests to send. */
static uint32_t fit_runs(const struct page_request *request)
{
    uint32_t outstanding = 0;
    for (uint32_t index = 0; index < request->run_count; index++) {
        struct run *run = &request->runs[index];
        if (run->count > connection.blocks_max)
            run->count = connection.blocks_max;
        outstanding += !run->done;
    }
    return outstanding;
}

enum page_result request_pages(const struct page_request *request, const struct arena_settings *settings,
                               struct patience *patience, char *reason)
{
    struct attempt attempt = {.settings = settings, .patience = patience, .reason = reason};
    enum page_result result = PAGES_DELIVERED;
    if (connection.busy || connection.owner != system_getpid() ||
        connection.generation != settings->connection_generation)
        disconnect();
    if (connection.fd < 0)
        result = connect_and_greet(&attempt);
    if (result == PAGES_DELIVERED) {
        uint64_t first_id = connection.last_id + 1;
        uint32_t outstanding = fit_runs(request);
        connection.last_id += request->run_count;
        connection.busy = true;
        attempt.limit_ns = system_now_ns() + SILENCE_LIMIT_NS;
        result = send_requests(&attempt, request, first_id)
                     ? receive_answers(&attempt, request, first_id, outstanding)
                     : PAGES_RETRY;
        connection.busy = false;
        if (result != PAGES_DELIVERED)
            disconnect();
    }
    if (result == PAGES_RETRY && patience->ended != NULL)
        return PAGES_GIVEN_UP;
    return result;
}
