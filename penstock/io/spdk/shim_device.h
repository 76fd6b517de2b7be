/* One open namespace, as the three parts of the shim that work on it see it. */
#ifndef PENSTOCK_SPDK_SHIM_DEVICE_H
#define PENSTOCK_SPDK_SHIM_DEVICE_H

#define _GNU_SOURCE
#include "shim_common.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <spdk/nvme.h>

enum { PIECES_MAX = 128, BOUNCE_SLOTS_MAX = 64, BOUNCE_ALIGNMENT = 4096, PIECE_BYTES_MAX = 1 << 20 };
#define NS_PER_S 1000000000ull

struct operation {
	struct psp_op op;
	uint64_t issued_bytes;
	uint32_t holds;                             /* its open pieces, and one while it is in to_issue */
	int error;
	char text[PSP_TEXT_BYTES];
	struct operation *next;
};

struct list {
	struct operation *first;
	struct operation **last;
};

struct piece {
	struct psp_device *device;
	struct operation *operation;
	uint64_t at_bytes;
	uint32_t length_bytes;
	void *bounce;
	bool is_open;
};

struct flush {
	int references;                             /* the waiting caller and the polling thread */
	bool is_done;
	int error;
	char text[PSP_TEXT_BYTES];
	struct flush *next;
};

enum state { CONNECTING, READY, FAILED, STOPPED };

struct psp_device {
	/* Set before the thread starts. */
	struct psp_target target;
	char *transport_id;

	/* Under the mutex. */
	pthread_mutex_t mutex;
	pthread_cond_t work;                        /* for the polling thread */
	pthread_cond_t news;                        /* for callers: completions, wake, flush, state */
	struct operation *slots;
	struct operation *free_slots;
	uint32_t free_count;
	struct list inbox;
	struct list ended;
	struct flush *flushes;
	enum state state;
	bool is_woken;
	bool is_stopping;
	bool is_abandoned;                          /* nobody waits: the thread frees the device */
	char failure[PSP_TEXT_BYTES];
	int failure_number;
	struct psp_info info;

	atomic_bool has_mail;                       /* inbox, flushes or is_stopping have news */

	/* The polling thread's own. */
	pthread_t thread;
	struct spdk_nvme_ctrlr *controller;
	struct spdk_nvme_ns *ns;
	struct spdk_nvme_qpair *queue_pair;
	struct list to_issue;
	struct list finished;
	struct piece pieces[PIECES_MAX];
	struct piece *free_pieces[PIECES_MAX];
	uint32_t free_pieces_count;
	struct flush *open_flush;
	struct flush *next_flush;
	void *bounces[BOUNCE_SLOTS_MAX];
	void *free_bounces[BOUNCE_SLOTS_MAX];
	uint32_t bounce_count;
	uint32_t free_bounce_count;
	bool needs_bounce;
	bool is_lost;
	char lost_text[PSP_TEXT_BYTES];
	uint64_t starved_since_ns;
	uint64_t admin_at_ns;
};

uint64_t psp_now_ns(void);
struct timespec psp_at_ns(uint64_t when_ns);
void psp_list_init(struct list *list);
void psp_list_push(struct list *list, struct operation *operation);
struct operation *psp_list_pop(struct list *list);
void psp_list_move(struct list *from, struct list *to);

/* On the polling thread. */
void psp_issue(struct psp_device *device);
void psp_start_flush(struct psp_device *device);
void psp_end_flushes(struct psp_device *device);
void psp_lose(struct psp_device *device, int rc);
void *psp_run(void *device);

void psp_free_device(struct psp_device *device);

#endif
