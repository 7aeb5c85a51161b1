/* The load generator: one thread, epoll, many TLS clients of one server on 127.0.0.1.
 *
 *   load MODE --port P [--connections N] [--size S] [--seconds D] [--warmup W] [--core C] [--pid SERVER]
 *
 * For a while, and then a report:
 *   echo   every connection sends S bytes, waits for the same bytes, and again: round trips a second, latencies
 *   down   every connection reads what the server sends as fast as it can: bytes a second
 *   up     every connection writes as fast as the server takes it: bytes a second
 *   both   both at once
 *   lines  every connection reads the lines of several senders: messages a second
 *   new    connect, full handshake, one round trip of S bytes, close, and again, N at a time: handshakes a second
 *   resume the same, but each handshake resumes a session
 *
 * Each a report, and then until stdin ends:
 *   idle   every connection makes one round trip and is then held
 *   vanish the same; at a first line on stdin all are gone without a word, and one more client is to be served
 *   half   every connection sends half a ClientHello and no more; then one honest client is to be served
 *
 * Each byte that comes back is compared; a wrong byte, an error or 20 silent seconds end the run with status 1.
 * A report is one line of JSON.  CPU times are those of the measured window only: of the server, of this process,
 * and of everything else on the machine, so that a reader can tell a quiet run from a disturbed one.
 */
#include "common.h"

#define HANDSHAKES_AT_ONCE 64
#define SILENCE 20.0

struct connection {
    SSL *ssl;
    int fd;
    uint32_t events;
    bool open;
    uint64_t round;   /* echo: stamped into the message, with the connection's number */
    size_t out, in;   /* echo: bytes of this round; down and up: bytes in all */
    double sent_at;
    uint64_t counted; /* round trips within the window */
    uint16_t next[SENDERS];     /* lines: the number of each sender's next one */
    char line[LINE];            /* lines: the part of one that has arrived, `in` bytes */
};

struct times {
    double wall, server, own, machine; /* seconds */
};

static enum { ECHO, DOWN, UP, BOTH, LINES, NEW, RESUME, IDLE, VANISH, HALF } mode;
static const char *const modes[] = {"echo", "down", "up", "both", "lines", "new", "resume", "idle", "vanish", "half"};
static int port, core = -1, server_pid;
static size_t connections = 1, size = 64;
static double seconds = 2, warmup = 0.5;

static int epoll;
static SSL_CTX *context;
static struct connection *all;
static size_t started, opened;
static unsigned char *message, *scratch;
static uint64_t operations, bytes, received, resumed;
static bool measuring;
static double last_progress;
static SSL_SESSION *ticket;
static unsigned char half_hello[512];
static size_t half_length;
static float *samples; /* µs */
static size_t sample_count, sample_room;

static double clock_seconds(clockid_t clock)
{
    struct timespec t;
    return clock_gettime(clock, &t) < 0 ? 0 : (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double now(void)
{
    return clock_seconds(CLOCK_MONOTONIC);
}

/* CPU seconds of all cores so far, without idle and iowait (proc(5), /proc/stat). */
static double machine_seconds(void)
{
    unsigned long long f[8] = {0};
    FILE *file = fopen("/proc/stat", "r");
    if (!file)
        return 0;
    int got = fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", f, f + 1, f + 2, f + 3, f + 4, f + 5, f + 6, f + 7);
    fclose(file);
    return got < 8 ? 0 : (double)(f[0] + f[1] + f[2] + f[5] + f[6] + f[7]) / (double)sysconf(_SC_CLK_TCK);
}

static struct times read_times(void)
{
    struct times t = {now(), 0, clock_seconds(CLOCK_PROCESS_CPUTIME_ID), machine_seconds()};
    clockid_t clock;
    if (server_pid && clock_getcpuclockid(server_pid, &clock) == 0)
        t.server = clock_seconds(clock);
    return t;
}

static void want(struct connection *c, uint32_t events)
{
    if (events != c->events)
        watch(epoll, EPOLL_CTL_MOD, c->fd, c->events = events, c);
}

/* What epoll should wait for after a call that returned `result`; ends the run on any error. */
static uint32_t wanted(struct connection *c, int result)
{
    switch (SSL_get_error(c->ssl, result)) {
    case SSL_ERROR_WANT_READ:
        return EPOLLIN;
    case SSL_ERROR_WANT_WRITE:
        return EPOLLOUT;
    case SSL_ERROR_ZERO_RETURN:
        errno = 0;
        die("the server closed a connection");
    default:
        die("a connection broke");
    }
}

/* Each gets its own copy: a client's OpenSSL spoils a TLS 1.3 ticket that was used, for others that share it too. */
static void resume(SSL *ssl)
{
    SSL_SESSION *copy = SSL_SESSION_dup(ticket);
    if (!copy || !SSL_set_session(ssl, copy))
        die("SSL_SESSION");
    SSL_SESSION_free(copy);
}

static void start(struct connection *c)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        die("socket");
    no_delay(c->fd);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        die("connect");
    c->sent_at = now();
    watch(epoll, EPOLL_CTL_ADD, c->fd, c->events = EPOLLOUT, c);
    if (mode == HALF && c < all + connections)
        return;
    if (!(c->ssl = SSL_new(context)))
        die("SSL_new");
    SSL_set_fd(c->ssl, c->fd);
    SSL_set_connect_state(c->ssl);
    SSL_set_tlsext_host_name(c->ssl, "localhost");
    if (mode == RESUME && ticket)
        resume(c->ssl);
}

static void start_one(void)
{
    start(&all[started++]);
}

static void is_open(struct connection *c)
{
    c->open = true;
    last_progress = now();
    opened++;
    if (started < connections)
        start_one();
}

/* Says half of what a client says first, and never the rest. */
static void say_half(struct connection *c)
{
    if (send(c->fd, half_hello, half_length, MSG_NOSIGNAL) != (ssize_t)half_length)
        die("half a ClientHello");
    watch(epoll, EPOLL_CTL_DEL, c->fd, 0, NULL);
    is_open(c);
}

static void make_half_hello(void)
{
    SSL *ssl = SSL_new(context);
    BIO *in = BIO_new(BIO_s_mem()), *out = BIO_new(BIO_s_mem());
    if (!ssl || !in || !out)
        die("SSL_new");
    SSL_set_bio(ssl, in, out);
    SSL_set_connect_state(ssl);
    SSL_do_handshake(ssl);
    ERR_clear_error();
    int whole = BIO_read(out, half_hello, sizeof half_hello);
    if (whole <= 0)
        die("ClientHello");
    half_length = (size_t)whole / 2;
    SSL_free(ssl);
}

static int keep_ticket(SSL *ssl, SSL_SESSION *session)
{
    (void)ssl;
    SSL_SESSION_free(ticket);
    if (!(ticket = SSL_SESSION_dup(session)))
        die("SSL_SESSION_dup");
    return 0;
}

static void hang_up(struct connection *c)
{
    struct linger at_once = {.l_onoff = 1, .l_linger = 0};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(c->fd);
    SSL_free(c->ssl);
    c->ssl = NULL;
}

static void stamp(struct connection *c)
{
    uint64_t mark[2] = {(uint64_t)(c - all), c->round};
    memcpy(message, mark, size < sizeof mark ? size : sizeof mark);
}

static void add_sample(double latency)
{
    if (sample_count == sample_room && !(samples = realloc(samples, (sample_room = 2 * sample_room + 65536) * sizeof *samples)))
        die("realloc");
    samples[sample_count++] = (float)(latency * 1e6);
}

/* Sends what is left of this round's message, and returns what to wait for. */
static uint32_t send_rest(struct connection *c)
{
    if (c->out == size)
        return EPOLLIN;
    stamp(c);
    while (c->out < size) {
        int n = SSL_write(c->ssl, message + c->out, (int)(size - c->out));
        if (n <= 0)
            return wanted(c, n) | EPOLLIN;
        c->out += (size_t)n;
    }
    return EPOLLIN;
}

static uint32_t next_round(struct connection *c)
{
    c->round++;
    c->in = c->out = 0;
    c->sent_at = now();
    return send_rest(c);
}

static void handshake(struct connection *c)
{
    int n = SSL_do_handshake(c->ssl);
    if (n != 1) {
        want(c, wanted(c, n));
        return;
    }
    if (mode == NEW || mode == RESUME) {
        double begun = c->sent_at;
        c->open = true;
        want(c, next_round(c));
        c->sent_at = begun;
        return;
    }
    if (mode != LINES && mode != DOWN && mode != UP && mode != BOTH)
        c->out = c->in = size; /* nothing is on its way: whatever comes before the first round is wrong */
    is_open(c);
    want(c, EPOLLIN);
}

/* A client of NEW or RESUME has been served: says close_notify, and the next one takes its place. */
static void again(struct connection *c)
{
    resumed += (uint64_t)SSL_session_reused(c->ssl);
    SSL_shutdown(c->ssl);
    hang_up(c);
    c->open = false;
    start(c);
}

static uint32_t finish_round(struct connection *c)
{
    double t = now();
    last_progress = t;
    operations++;
    bytes += size;
    if (measuring) {
        c->counted++;
        add_sample(t - c->sent_at);
    }
    return mode == ECHO ? next_round(c) : EPOLLIN;
}

static void echo(struct connection *c)
{
    uint32_t events = send_rest(c);
    for (;;) {
        int n = SSL_read(c->ssl, scratch, RECORD);
        if (n <= 0) {
            want(c, events | wanted(c, n));
            return;
        }
        stamp(c);
        errno = 0;
        if (c->in + (size_t)n > c->out || memcmp(scratch, message + c->in, (size_t)n))
            die("a wrong byte came back");
        c->in += (size_t)n;
        if (c->in < size)
            continue;
        events = finish_round(c);
        if (mode == NEW || mode == RESUME) {
            again(c);
            return;
        }
        if (!SSL_has_pending(c->ssl)) {
            want(c, events);
            return;
        }
    }
}

/* Bounded, so that one connection cannot hold the loop; a source never stops, so what stays inside SSL is not stuck. */
static void down(struct connection *c)
{
    for (int i = 0; i < 64; i++) {
        int n = SSL_read(c->ssl, scratch, RECORD);
        if (n <= 0) {
            want(c, wanted(c, n));
            return;
        }
        errno = 0;
        if (memcmp(scratch, pattern + c->in % 256, (size_t)n))
            die("a wrong byte arrived");
        c->in += (size_t)n;
        bytes += (size_t)n;
        last_progress = now();
    }
}

static void up(struct connection *c)
{
    for (int i = 0; i < 64; i++) {
        int n = SSL_write(c->ssl, pattern + c->out % 256, RECORD);
        if (n <= 0) {
            want(c, wanted(c, n));
            return;
        }
        c->out += (size_t)n;
        bytes += (size_t)n;
        last_progress = now();
    }
    want(c, EPOLLOUT);
}

static void both(struct connection *c)
{
    bool moved = true;
    uint32_t events = EPOLLIN | EPOLLOUT;
    for (int i = 0; i < 64 && moved; i++) {
        int n = SSL_read(c->ssl, scratch, RECORD);
        if ((moved = n > 0)) {
            errno = 0;
            if (memcmp(scratch, pattern + c->in % 256, (size_t)n))
                die("a wrong byte arrived");
            c->in += (size_t)n;
            bytes += (size_t)n;
            received += (size_t)n;
        } else {
            wanted(c, n);
        }
        n = SSL_write(c->ssl, pattern + c->out % 256, RECORD);
        if (n > 0) {
            c->out += (size_t)n;
            bytes += (size_t)n;
            moved = true;
        } else {
            wanted(c, n);
        }
        if (moved)
            last_progress = now();
    }
    want(c, events);
}

/* A whole line has come: it must be its sender's next. */
static void check_line(struct connection *c, const char *line)
{
    unsigned sender = (unsigned)line[0] - '0';
    errno = 0;
    if (sender >= SENDERS || memcmp(line, marks[sender][c->next[sender]], MARK) ||
        memcmp(line + MARK, rest_of_line, sizeof rest_of_line))
        die("a wrong line arrived");
    c->next[sender] = (uint16_t)((c->next[sender] + 1) % NUMBERS);
    operations++;
    if (measuring)
        c->counted++;
}

static void lines(struct connection *c)
{
    for (int i = 0; i < 64; i++) {
        int n = SSL_read(c->ssl, scratch, RECORD);
        if (n <= 0) {
            want(c, wanted(c, n));
            return;
        }
        bytes += (size_t)n;
        last_progress = now();
        for (size_t at = 0; at < (size_t)n;) {
            size_t left = (size_t)n - at, part = LINE - c->in < left ? LINE - c->in : left;
            if (part == LINE) {
                check_line(c, (char *)scratch + at);
            } else {
                memcpy(c->line + c->in, scratch + at, part);
                c->in = (c->in + part) % LINE;
                if (!c->in)
                    check_line(c, c->line);
            }
            at += part;
        }
    }
}

static void serve(struct connection *c)
{
    ERR_clear_error();
    if (!c->ssl)
        say_half(c);
    else if (!c->open)
        handshake(c);
    else if (mode == DOWN)
        down(c);
    else if (mode == UP)
        up(c);
    else if (mode == BOTH)
        both(c);
    else if (mode == LINES)
        lines(c);
    else
        echo(c);
}

/* Handles what is ready; waits at most 0.1 s, or 1 s when idle.  False when stdin has something or ended. */
static bool turn(void)
{
    struct epoll_event events[256];
    int count = epoll_wait(epoll, events, 256, mode >= IDLE ? 1000 : 100);
    bool stdin_open = true;
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr)
            serve(events[i].data.ptr);
        else
            stdin_open = false;
    }
    return stdin_open;
}

static void still_moving(void)
{
    errno = 0;
    if (now() - last_progress > SILENCE) {
        fprintf(stderr, "%zu of %zu connections open\n", opened, connections);
        die("nothing moved for 20 seconds");
    }
}

static double open_all(void)
{
    double begin = last_progress = now();
    while (started < connections && started < HANDSHAKES_AT_ONCE)
        start_one();
    while (opened < connections) {
        turn();
        still_moving();
    }
    return now() - begin;
}

/* The first of those that resume goes ahead, for the ticket of all. */
static double start_all(void)
{
    last_progress = now();
    if (mode == RESUME)
        start_one();
    while (mode == RESUME && !ticket && operations < 2) {
        turn();
        still_moving();
    }
    while (started < connections)
        start_one();
    return 0;
}

static void run_for(double duration)
{
    double end = now() + duration;
    while (now() < end) {
        turn();
        still_moving();
    }
}

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double percentile(double fraction)
{
    return sample_count ? samples[(size_t)(fraction * (double)(sample_count - 1))] : 0;
}

static void report(struct times a, struct times b, double handshakes)
{
    const char *version = all[0].ssl ? SSL_get_version(all[0].ssl) : "", *cipher = all[0].ssl ? SSL_get_cipher(all[0].ssl) : "";
    size_t starved = 0;
    for (size_t i = 0; i < connections; i++)
        starved += !all[i].counted;
    if (mode == NEW || mode == RESUME)
        starved = 0;
    qsort(samples, sample_count, sizeof *samples, ascending);
    printf("{\"mode\": \"%s\", \"connections\": %zu, \"size\": %zu, \"version\": \"%s\", \"cipher\": \"%s\", ", modes[mode],
           connections, size, version, cipher);
    printf("\"handshake_seconds\": %.4f, \"seconds\": %.4f, \"operations\": %llu, \"bytes\": %llu, ", handshakes,
           b.wall - a.wall, (unsigned long long)operations, (unsigned long long)bytes);
    if (sample_count)
        printf("\"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, ", percentile(0.50), percentile(0.99), percentile(1));
    if (mode == ECHO || mode == LINES)
        printf("\"starved\": %zu, ", starved);
    if (mode == BOTH)
        printf("\"received\": %llu, ", (unsigned long long)received);
    if (mode == NEW || mode == RESUME)
        printf("\"resumed\": %llu, ", (unsigned long long)resumed);
    printf("\"server_cpu\": %.4f, \"generator_cpu\": %.4f, \"other_cpu\": %.4f}\n", b.server - a.server, b.own - a.own,
           b.machine - a.machine - (b.server - a.server) - (b.own - a.own));
    fflush(stdout);
}

static void measure(double handshakes)
{
    for (size_t i = 0; i < connections; i++) {
        if (mode == ECHO)
            want(&all[i], next_round(&all[i]));
        else if (mode == UP || mode == BOTH)
            want(&all[i], EPOLLOUT);
    }
    run_for(warmup);
    operations = bytes = received = resumed = 0;
    measuring = true;
    struct times begin = read_times();
    run_for(seconds);
    report(begin, read_times(), handshakes);
}

static void until_stdin(void)
{
    watch(epoll, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, NULL);
    while (turn())
        ;
    watch(epoll, EPOLL_CTL_DEL, STDIN_FILENO, 0, NULL);
}

/* One more client, from its connect to its first round trip: milliseconds. */
static double serve_one_more(void)
{
    struct connection *c = &all[connections];
    double begin = last_progress = now();
    uint64_t before = operations;
    start(c);
    while (!c->open) {
        turn();
        still_moving();
    }
    want(c, next_round(c));
    while (operations == before) {
        turn();
        still_moving();
    }
    double took = 1000 * (now() - begin);
    hang_up(c);
    *c = (struct connection){0};
    return took;
}

static void hold(double handshakes)
{
    for (size_t i = 0; i < connections; i++)
        want(&all[i], next_round(&all[i]));
    while (operations < connections) {
        turn();
        still_moving();
    }
    printf("{\"mode\": \"%s\", \"connections\": %zu, \"handshake_seconds\": %.4f}\n", modes[mode], connections, handshakes);
    fflush(stdout);
    until_stdin();
}

static void hold_half(double opening)
{
    double first = serve_one_more(), second = serve_one_more();
    printf("{\"mode\": \"half\", \"connections\": %zu, \"opening_seconds\": %.4f, \"first_ms\": %.2f, \"second_ms\": %.2f}\n",
           connections, opening, first, second);
    fflush(stdout);
    until_stdin();
}

static void vanish(void)
{
    char go;
    if (read(STDIN_FILENO, &go, 1) != 1)
        return;
    for (size_t i = 0; i < connections; i++)
        close(all[i].fd);
    double first = serve_one_more();
    printf("{\"first_ms\": %.2f}\n", first);
    fflush(stdout);
    until_stdin();
}

/* Says close_notify and resets, so that no run leaves its ports in TIME_WAIT for the runs after it. */
static void close_all(void)
{
    for (size_t i = 0; i < connections; i++) {
        if (all[i].open && all[i].ssl)
            SSL_shutdown(all[i].ssl);
        hang_up(&all[i]);
    }
}

static _Noreturn void usage(void)
{
    fprintf(stderr, "usage: load MODE --port P [--connections N] [--size S] [--seconds D] [--warmup W] "
                    "[--core C] [--pid SERVER]\n");
    exit(2);
}

static void parse(int argc, char **argv)
{
    int found = -1;
    for (int i = 0; argc > 1 && i < (int)(sizeof modes / sizeof *modes); i++)
        if (!strcmp(argv[1], modes[i]))
            found = i;
    if (found < 0)
        usage();
    mode = (unsigned)found;
    for (int i = 2; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--port")) port = atoi(value);
        else if (!strcmp(name, "--connections")) connections = strtoul(value, NULL, 10);
        else if (!strcmp(name, "--size")) size = strtoul(value, NULL, 10);
        else if (!strcmp(name, "--seconds")) seconds = atof(value);
        else if (!strcmp(name, "--warmup")) warmup = atof(value);
        else if (!strcmp(name, "--core")) core = atoi(value);
        else if (!strcmp(name, "--pid")) server_pid = atoi(value);
        else usage();
    }
    if (!port || !connections || !size || argc % 2)
        usage();
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    pin(core);
    raise_fd_limit();
    make_pattern();
    make_lines();
    context = new_context(TLS_client_method());
    SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL); /* the certificate is a throw-away; this measures servers */
    if (mode == RESUME) {
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
        SSL_CTX_sess_set_new_cb(context, keep_ticket);
    }
    if (mode == HALF)
        make_half_hello();
    all = calloc(connections + 1, sizeof *all);
    message = malloc(size);
    scratch = malloc(RECORD);
    if (!all || !message || !scratch)
        die("malloc");
    for (size_t i = 0; i < size; i++)
        message[i] = (unsigned char)(i * 7);
    epoll = epoll_create1(EPOLL_CLOEXEC);

    double opening = mode == NEW || mode == RESUME ? start_all() : open_all();
    if (mode == HALF)
        hold_half(opening);
    else if (mode == IDLE || mode == VANISH)
        hold(opening);
    else
        measure(opening);
    if (mode == VANISH)
        vanish();
    else
        close_all();
    return 0;
}
