/* Listens to a zmqbus publisher. Written from docs/protocol.md, with nothing but libzmq.
 *
 *     listen ENDPOINT TOPIC COUNT [SERVER_PUBLIC CLIENT_PUBLIC CLIENT_SECRET]
 *
 * TOPIC is a topic, or a prefix that ends in a dot, or "" for everything. Keys are in Z85.
 * Prints "TOPIC ORIGIN SEQ VALUE" for COUNT messages, the value as msgpack in hex ("raw" before bytes that came unpacked).
 * What breaks the protocol is reported on stderr and skipped.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

enum { DATA = 1 };
enum { HEADERS = 1, EXTERNAL = 2, RAW = 4 };
enum { HEADER_BYTES = 32 };

/* The bytes of a part that are not looked at yet. */
struct view {
    const uint8_t *at;
    size_t left;
};

static uint64_t little_endian(const uint8_t *bytes, int size)
{
    uint64_t value = 0;
    while (size--)
        value = value << 8 | bytes[size];
    return value;
}

static uint64_t big_endian(const uint8_t *bytes, size_t size)
{
    uint64_t value = 0;
    for (size_t i = 0; i < size; i++)
        value = value << 8 | bytes[i];
    return value;
}

/* How many bytes the msgpack item at the front takes; 0 when it is malformed or cut short. */
static size_t item_size(struct view view)
{
    size_t at = 0;
    uint64_t pending = 1; /* items still to be passed, at any depth */

    while (pending--) {
        if (at >= view.left)
            return 0;
        uint8_t type = view.at[at++];
        size_t length_bytes = 0; /* of a length that follows the type */
        uint64_t skip = 0, items_each = 0;

        if (type <= 0x7f || type >= 0xe0 || type == 0xc0 || type == 0xc2 || type == 0xc3)
            continue;
        else if (type <= 0x8f)
            pending += 2 * (type & 15);
        else if (type <= 0x9f)
            pending += type & 15;
        else if (type <= 0xbf)
            skip = type & 31;
        else if (type == 0xc1)
            return 0;
        else if (type <= 0xc6) /* bin */
            length_bytes = (size_t)1 << (type - 0xc4);
        else if (type <= 0xc9) { /* ext: its type, then its bytes */
            length_bytes = (size_t)1 << (type - 0xc7);
            skip = 1;
        } else if (type <= 0xcb) /* float */
            skip = 4 << (type - 0xca);
        else if (type <= 0xcf) /* uint */
            skip = 1 << (type - 0xcc);
        else if (type <= 0xd3) /* int */
            skip = 1 << (type - 0xd0);
        else if (type <= 0xd8) /* fixext */
            skip = 1 + (1 << (type - 0xd4));
        else if (type <= 0xdb) /* str */
            length_bytes = (size_t)1 << (type - 0xd9);
        else { /* array, map */
            length_bytes = type & 1 ? 4 : 2;
            items_each = type <= 0xdd ? 1 : 2;
        }
        if (length_bytes) {
            if (view.left - at < length_bytes)
                return 0;
            uint64_t length = big_endian(view.at + at, length_bytes);
            at += length_bytes;
            if (items_each)
                pending += items_each * length;
            else
                skip += length;
        }
        if (view.left - at < skip)
            return 0;
        at += skip;
    }
    return at;
}

/* Step into the array at the front: returns how many items follow, or -1 when it is none. */
static int64_t enter_array(struct view *view)
{
    size_t header = 1;
    if (view->left && (view->at[0] & 0xf0) == 0x90)
        header = 1;
    else if (view->left >= 3 && view->at[0] == 0xdc)
        header = 3;
    else if (view->left >= 5 && view->at[0] == 0xdd)
        header = 5;
    else
        return -1;
    int64_t items = header == 1 ? view->at[0] & 15 : (int64_t)big_endian(view->at + 1, header - 1);
    view->at += header;
    view->left -= header;
    return items;
}

static void print_message(const char *topic, uint64_t origin, uint64_t seq, const char *how, struct view value)
{
    printf("%s %016" PRIx64 " %" PRIu64 " %s", topic, origin, seq, how);
    for (size_t i = 0; i < value.left; i++)
        printf("%02x", value.at[i]);
    putchar('\n');
}

/* Print the messages of one DATA frame; `payload` is what follows the header, or the second part.
 * Returns how many, or -1 when it breaks the protocol. */
static int print_messages(const uint8_t *frame, size_t topic_bytes, struct view payload, unsigned flags)
{
    const uint8_t *header = frame + topic_bytes + 1;
    const char *topic = (const char *)frame; /* the zero ends it */
    uint64_t count = little_endian(header + 4, 4);
    uint64_t origin = little_endian(header + 8, 8);
    uint64_t first = little_endian(header + 16, 8);

    if (!count || !first || count - 1 > UINT64_MAX - first)
        return -1;
    if (flags & RAW) {
        print_message(topic, origin, first, "raw", payload);
        return 1;
    }
    if (flags & HEADERS && enter_array(&payload) != 2)
        return -1;
    if (enter_array(&payload) != (int64_t)count)
        return -1;
    for (uint64_t i = 0; i < count; i++) {
        size_t size = item_size(payload);
        if (!size)
            return -1;
        print_message(topic, origin, first + i, "", (struct view){payload.at, size});
        payload.at += size;
        payload.left -= size;
    }
    /* What is left now are the headers, if there are any: an array of `count` maps or nils. */
    return (int)count;
}

static void receive_part(zmq_msg_t *part, void *socket)
{
    if (zmq_msg_recv(part, socket, 0) < 0) {
        perror("zmq_msg_recv");
        exit(1);
    }
}

/* One message of the socket, of one or two parts. Returns how many messages it held, or -1. */
static int receive(void *socket)
{
    zmq_msg_t part, external, surplus;
    int parts = 1, printed = -1;

    zmq_msg_init(&part);
    zmq_msg_init(&external);
    zmq_msg_init(&surplus);
    receive_part(&part, socket);
    if (zmq_msg_more(&part)) {
        parts = 2;
        receive_part(&external, socket);
        for (int more = zmq_msg_more(&external); more; more = zmq_msg_more(&surplus)) {
            parts = 3; /* or more: too many */
            receive_part(&surplus, socket);
        }
    }
    const uint8_t *frame = zmq_msg_data(&part);
    size_t size = zmq_msg_size(&part);
    const uint8_t *end = memchr(frame, 0, size < 256 ? size : 256);
    size_t topic_bytes = end ? (size_t)(end - frame) : 0;

    if (topic_bytes && size >= topic_bytes + 1 + HEADER_BYTES && end[1] == 1) {
        unsigned kind = end[2], flags = (unsigned)little_endian(end + 3, 2);
        struct view payload = {end + 1 + HEADER_BYTES, size - topic_bytes - 1 - HEADER_BYTES};

        if (kind != DATA)
            printed = 0; /* HEAD and HEARTBEAT are of no use to one that cannot repair; others are unknown */
        else if (flags <= HEADERS && parts == 1)
            printed = print_messages(frame, topic_bytes, payload, flags);
        else if (flags == EXTERNAL || flags == (EXTERNAL | HEADERS) || flags == (EXTERNAL | RAW)) {
            if (parts == 2 && !payload.left && little_endian(end + 5, 4) == 1)
                printed = print_messages(
                    frame, topic_bytes, (struct view){zmq_msg_data(&external), zmq_msg_size(&external)}, flags);
        }
    }
    zmq_msg_close(&surplus);
    zmq_msg_close(&external);
    zmq_msg_close(&part);
    return printed;
}

int main(int argc, char **argv)
{
    if (argc != 4 && argc != 7) {
        fprintf(stderr, "usage: listen ENDPOINT TOPIC COUNT [SERVER_PUBLIC CLIENT_PUBLIC CLIENT_SECRET]\n");
        return 2;
    }
    void *context = zmq_ctx_new();
    void *socket = zmq_socket(context, ZMQ_SUB);
    const char *topic = argv[2];
    size_t topic_bytes = strlen(topic);
    int is_prefix = !topic_bytes || topic[topic_bytes - 1] == '.';

    if (argc == 7
        && (zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, argv[4], strlen(argv[4]) + 1)
            || zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, argv[5], strlen(argv[5]) + 1)
            || zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, argv[6], strlen(argv[6]) + 1))) {
        perror("keys");
        return 1;
    }
    /* An exact topic is subscribed to with the zero that ends it. */
    if (zmq_setsockopt(socket, ZMQ_SUBSCRIBE, topic, topic_bytes + !is_prefix) || zmq_connect(socket, argv[1])) {
        perror(argv[1]);
        return 1;
    }
    for (long wanted = strtol(argv[3], NULL, 10); wanted > 0;) {
        int received = receive(socket);
        if (received < 0)
            fprintf(stderr, "something that breaks the protocol\n");
        else
            wanted -= received;
        fflush(stdout);
    }
    zmq_close(socket);
    zmq_ctx_term(context);
    return 0;
}
