/* The limit: one thread, epoll, OpenSSL.  server ROLE CERT KEY CORE; ROLE is echo, source, sink, both or lines.
 *
 * Prints "port N", and ends when its stdin does.
 */
#include "common.h"

struct peer {
    SSL *ssl;
    int fd;
    uint32_t events;
    unsigned char *unsent; /* only while the client does not take its echo */
    size_t length, offset;
};

static int epoll;
static enum { ECHO, SOURCE, SINK, BOTH, LINES } role;
static const char *const roles[] = {"echo", "source", "sink", "both", "lines"};

static void drop(struct peer *peer)
{
    SSL_free(peer->ssl);
    close(peer->fd);
    free(peer->unsent);
    free(peer);
}

static void want(struct peer *peer, uint32_t events)
{
    if (events == peer->events)
        return;
    peer->events = events;
    watch(epoll, EPOLL_CTL_MOD, peer->fd, events, peer);
}

/* Waits for what a failed call wants; false when the connection is over. */
static bool wanted(struct peer *peer, int result)
{
    int error = SSL_get_error(peer->ssl, result);
    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
        return false;
    want(peer, error == SSL_ERROR_WANT_READ ? EPOLLIN : EPOLLOUT);
    return true;
}

static bool keep(struct peer *peer, const unsigned char *data, size_t length)
{
    if (!(peer->unsent = malloc(length)))
        die("malloc");
    memcpy(peer->unsent, data, length);
    peer->length = length;
    peer->offset = 0;
    return true;
}

/* Writes until all is written; 1 done, 0 must wait, -1 over. */
static int write_all(struct peer *peer, const unsigned char *data, size_t length, size_t *done)
{
    while (*done < length) {
        int n = SSL_write(peer->ssl, data + *done, (int)(length - *done));
        if (n <= 0)
            return wanted(peer, n) ? 0 : -1;
        *done += (size_t)n;
    }
    return 1;
}

static bool echo(struct peer *peer)
{
    unsigned char data[RECORD];
    if (peer->unsent) {
        int state = write_all(peer, peer->unsent, peer->length, &peer->offset);
        if (state <= 0)
            return state == 0;
        free(peer->unsent);
        peer->unsent = NULL;
    }
    do {
        int n = SSL_read(peer->ssl, data, sizeof data);
        if (n <= 0)
            return wanted(peer, n);
        size_t done = 0;
        int state = write_all(peer, data, (size_t)n, &done);
        if (state <= 0)
            return state == 0 && keep(peer, data + done, (size_t)n - done);
    } while (SSL_has_pending(peer->ssl));
    want(peer, EPOLLIN);
    return true;
}

static bool source(struct peer *peer)
{
    for (;;) {
        int n = SSL_write(peer->ssl, pattern + peer->offset % 256, RECORD);
        if (n <= 0)
            return wanted(peer, n);
        peer->offset += (size_t)n;
    }
}

static bool sink(struct peer *peer)
{
    unsigned char data[RECORD];
    for (;;) {
        int n = SSL_read(peer->ssl, data, sizeof data);
        if (n <= 0)
            return wanted(peer, n);
    }
}

/* Until neither way goes on; then it waits for both. */
static bool both(struct peer *peer)
{
    unsigned char data[RECORD];
    bool moved;
    do {
        moved = false;
        for (int i = 0; i < 8; i++) {
            int n = SSL_read(peer->ssl, data, sizeof data);
            if (n <= 0 && !wanted(peer, n))
                return false;
            if (n <= 0)
                break;
            moved = true;
        }
        for (int i = 0; i < 8; i++) {
            int n = SSL_write(peer->ssl, pattern + peer->offset % 256, RECORD);
            if (n <= 0 && !wanted(peer, n))
                return false;
            if (n <= 0)
                break;
            peer->offset += (size_t)n;
            moved = true;
        }
    } while (moved);
    want(peer, EPOLLIN | EPOLLOUT);
    return true;
}

/* One SSL_write a message, as the other servers' senders have one call a message; each session gets its share. */
static bool lines(struct peer *peer)
{
    for (int i = 0; i < 64; i++) {
        size_t sender = peer->offset % SENDERS, number = peer->offset / SENDERS % NUMBERS;
        char line[LINE];
        memcpy(line, marks[sender][number], MARK);
        memcpy(line + MARK, rest_of_line, sizeof rest_of_line);
        int n = SSL_write(peer->ssl, line, LINE);
        if (n <= 0)
            return wanted(peer, n);
        peer->offset++;
    }
    want(peer, EPOLLOUT);
    return true;
}

static bool serve(struct peer *peer)
{
    ERR_clear_error();
    if (!SSL_is_init_finished(peer->ssl)) {
        int n = SSL_do_handshake(peer->ssl);
        if (n <= 0)
            return wanted(peer, n);
    }
    static bool (*const serves[])(struct peer *) = {echo, source, sink, both, lines};
    return serves[role](peer);
}

static void accept_all(int listener, SSL_CTX *context)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct peer *peer = calloc(1, sizeof *peer);
        if (!peer || !(peer->ssl = SSL_new(context)))
            die("SSL_new");
        peer->fd = fd;
        no_delay(fd);
        SSL_set_fd(peer->ssl, fd);
        SSL_set_accept_state(peer->ssl);
        peer->events = EPOLLIN;
        watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, peer);
    }
}

static int listen_on_loopback(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) < 0 || listen(fd, 4096) < 0)
        die("listen");
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: server echo|source|sink|both|lines CERT KEY CORE\n");
        return 2;
    }
    for (unsigned i = 0; i < sizeof roles / sizeof *roles; i++)
        if (!strcmp(argv[1], roles[i]))
            role = i;
    signal(SIGPIPE, SIG_IGN);
    pin(atoi(argv[4]));
    raise_fd_limit();
    make_pattern();
    make_lines();

    SSL_CTX *context = new_context(TLS_server_method());
    SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
    if (SSL_CTX_use_certificate_chain_file(context, argv[2]) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, argv[3], SSL_FILETYPE_PEM) != 1)
        die("certificate");

    static char at_listener, at_stdin;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on_loopback();
    watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &at_listener);
    watch(epoll, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, &at_stdin);
    for (;;) {
        struct epoll_event events[256];
        int count = epoll_wait(epoll, events, 256, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == &at_stdin)
                return 0;
            if (events[i].data.ptr == &at_listener)
                accept_all(listener, context);
            else if (!serve(events[i].data.ptr))
                drop(events[i].data.ptr);
        }
    }
}
