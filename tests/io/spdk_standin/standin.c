/* A stand-in SPDK for tests: NVMe drives over files, one thread per queue pair as the drive, faults on demand.
 *
 * It checks its caller as a real drive would punish it: one thread per queue pair, transfers within the limit and
 * within the namespace, only DMA memory on PCIe, nothing freed twice. The first offence is kept for the test to read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include <spdk/env.h>
#include <spdk/log.h>
#include <spdk/nvme.h>

#define EXPORT __attribute__((visibility("default")))
enum { DRIVES_MAX = 32, REGIONS_MAX = 1024, COMMANDS_MAX = 256, ABORTED_SQ_DELETION = 8 };

struct settings {
	/* Of a drive. */
	long delay_us, held, removed, removed_admin, silent, busy_submits, fail_from, fail_to, sct, sc, connect_held;
	long detach_held, no_queue, no_flush, flush_sc, flushes, admin_polls, reads, writes, largest, direct, namespaces;
};

struct drive {
	char key[300], path[400];
	uint64_t bytes;
	uint32_t lba_bytes, transfer_bytes, metadata_bytes;
	struct settings set;
};

struct spdk_nvme_ns {
	struct spdk_nvme_ctrlr *controller;
	bool is_active;
};

struct spdk_nvme_ctrlr {
	struct drive *drive;
	int fd;
	bool is_pcie;
	struct spdk_nvme_ns ns;
};

struct command {
	char kind;
	void *payload;
	uint64_t lba;
	uint32_t count;
	spdk_nvme_cmd_cb callback;
	void *argument;
	uint8_t sct, sc;
	int state; /* 0 free, 1 given, 2 in the drive's hands, 3 done */
	uint64_t order;
};

struct spdk_nvme_qpair {
	struct spdk_nvme_ctrlr *controller;
	pthread_t owner, drive;
	bool is_stopping;
	uint64_t next_order;
	struct command commands[COMMANDS_MAX];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct drive drives[DRIVES_MAX];
static int drives_count;
static char offence[200], started_with[2000];
static struct { char *start, *end; bool is_registered; } regions[REGIONS_MAX];
static spdk_log_cb *log_callback;
static bool is_started;
static struct { long env_error, no_dma, no_register, iommu; } global;

static void
offend(const char *what)
{
	if (!offence[0]) {
		snprintf(offence, sizeof(offence), "%s", what);
	}
}

static void
log_error(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	if (log_callback) {
		log_callback(SPDK_LOG_ERROR, __FILE__, __LINE__, __func__, format, arguments);
	}
	va_end(arguments);
}

/* ---- for tests ---- */

static struct drive *
find(const char *key)
{
	int i;

	for (i = 0; i < DRIVES_MAX; i++) {
		if (!strcmp(drives[i].key, key)) {
			return &drives[i];
		}
	}
	return NULL;
}

EXPORT void
standin_drive(const char *key, const char *path, uint64_t bytes, uint32_t lba, uint32_t transfer, uint32_t metadata)
{
	struct drive *drive;

	pthread_mutex_lock(&lock);
	drive = find(key);
	drive = drive ? drive : &drives[drives_count++ % DRIVES_MAX];
	memset(drive, 0, sizeof(*drive));
	snprintf(drive->key, sizeof(drive->key), "%s", key);
	snprintf(drive->path, sizeof(drive->path), "%s", path);
	drive->bytes = bytes;
	drive->lba_bytes = lba;
	drive->transfer_bytes = transfer;
	drive->metadata_bytes = metadata;
	drive->set.namespaces = 1;
	pthread_mutex_unlock(&lock);
}

static long *
setting(const char *key, const char *name)
{
	struct drive *drive = find(key);

#define FIELD(base, field) if (!strcmp(name, #field)) return &(base).field
	FIELD(global, env_error);
	FIELD(global, no_dma);
	FIELD(global, no_register);
	FIELD(global, iommu);
	if (drive == NULL) {
		abort();
	}
	FIELD(drive->set, delay_us);
	FIELD(drive->set, held);
	FIELD(drive->set, removed);
	FIELD(drive->set, removed_admin);
	FIELD(drive->set, silent);
	FIELD(drive->set, busy_submits);
	FIELD(drive->set, fail_from);
	FIELD(drive->set, fail_to);
	FIELD(drive->set, sct);
	FIELD(drive->set, sc);
	FIELD(drive->set, connect_held);
	FIELD(drive->set, detach_held);
	FIELD(drive->set, no_queue);
	FIELD(drive->set, no_flush);
	FIELD(drive->set, flush_sc);
	FIELD(drive->set, flushes);
	FIELD(drive->set, admin_polls);
	FIELD(drive->set, reads);
	FIELD(drive->set, writes);
	FIELD(drive->set, largest);
	FIELD(drive->set, direct);
	FIELD(drive->set, namespaces);
	abort();
}

EXPORT void
standin_set(const char *key, const char *name, long value)
{
	pthread_mutex_lock(&lock);
	*setting(key, name) = value;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

EXPORT long
standin_get(const char *key, const char *name)
{
	long value;

	pthread_mutex_lock(&lock);
	value = *setting(key, name);
	pthread_mutex_unlock(&lock);
	return value;
}

EXPORT const char *
standin_offence(void)
{
	return offence;
}

EXPORT const char *
standin_environment(void)
{
	return started_with;
}

EXPORT int
standin_dma_regions(int is_registered)
{
	int i, count = 0;

	pthread_mutex_lock(&lock);
	for (i = 0; i < REGIONS_MAX; i++) {
		count += regions[i].start && regions[i].is_registered == (is_registered != 0);
	}
	pthread_mutex_unlock(&lock);
	return count;
}

/* ---- log and environment ---- */

EXPORT void
spdk_log_open(spdk_log_cb *log)
{
	log_callback = log;
}

EXPORT void
spdk_env_opts_init(struct spdk_env_opts *opts)
{
#ifndef STANDIN_OLD
	size_t opts_size = opts->opts_size;

	memset(opts, 0, sizeof(*opts));
	opts->opts_size = opts_size;
#else
	memset(opts, 0, sizeof(*opts));
#endif
	opts->core_mask = "0x1";
	opts->mem_size = -1;
}

EXPORT int
spdk_env_init(const struct spdk_env_opts *opts)
{
	size_t i, at;

	if (is_started) {
		offend("the environment was started twice");
		return -EINVAL;
	}
	if (global.env_error) {
		log_error("Failed to initialize %s\n", "DPDK");
		return -(int)global.env_error;
	}
#ifndef STANDIN_OLD
	if (opts->opts_size != sizeof(*opts)) {
		offend("opts_size is wrong");
	}
	at = (size_t)snprintf(started_with, sizeof(started_with), "cores=%s mem=%d no_pci=%d single=%d no_huge=%d",
			      opts->core_mask, opts->mem_size, opts->no_pci, opts->hugepage_single_segments,
			      opts->no_huge);
#else
	at = (size_t)snprintf(started_with, sizeof(started_with), "cores=%s mem=%d no_pci=%d single=%d",
			      opts->core_mask, opts->mem_size, opts->no_pci, opts->hugepage_single_segments);
#endif
	for (i = 0; i < opts->num_pci_addr; i++) {
		const struct spdk_pci_addr *address = &opts->pci_allowed[i];

		at += (size_t)snprintf(started_with + at, sizeof(started_with) - at, " allow=%04x:%02x:%02x.%x",
				       address->domain, address->bus, address->dev, address->func);
	}
	is_started = true;
	return 0;
}

EXPORT int
spdk_pci_addr_parse(struct spdk_pci_addr *addr, const char *bdf)
{
	unsigned domain, bus, dev, func;

	if (sscanf(bdf, "%x:%x:%x.%x", &domain, &bus, &dev, &func) != 4) {
		return -EINVAL;
	}
	*addr = (struct spdk_pci_addr){ domain, (uint8_t)bus, (uint8_t)dev, (uint8_t)func };
	return 0;
}

static int
add_region(void *start, size_t bytes, bool is_registered)
{
	int i;

	for (i = 0; i < REGIONS_MAX; i++) {
		if (regions[i].start < (char *)start + bytes && (char *)start < regions[i].end) {
			return -EBUSY;
		}
	}
	for (i = 0; i < REGIONS_MAX && regions[i].start; i++) {
	}
	if (i == REGIONS_MAX) {
		return -ENOMEM;
	}
	regions[i].start = start;
	regions[i].end = (char *)start + bytes;
	regions[i].is_registered = is_registered;
	return 0;
}

static int
drop_region(void *start)
{
	int i;

	for (i = 0; i < REGIONS_MAX; i++) {
		if (regions[i].start == start) {
			regions[i].start = regions[i].end = NULL;
			return 0;
		}
	}
	offend("memory was given back that nobody took");
	return -EINVAL;
}

EXPORT void *
spdk_dma_zmalloc(size_t size, size_t align, uint64_t *unused)
{
	void *memory = NULL;

	(void)unused;
	pthread_mutex_lock(&lock);
	if (!global.no_dma && posix_memalign(&memory, align, size) == 0) {
		memset(memory, 0, size);
		add_region(memory, size, false);
	}
	pthread_mutex_unlock(&lock);
	return memory;
}

EXPORT void
spdk_dma_free(void *buf)
{
	pthread_mutex_lock(&lock);
	drop_region(buf);
	pthread_mutex_unlock(&lock);
	free(buf);
}

EXPORT int
spdk_mem_register(void *vaddr, size_t len)
{
	int rc;

	if (((uintptr_t)vaddr | len) & ((2u << 20) - 1)) {
		return -EINVAL;
	}
	pthread_mutex_lock(&lock);
	rc = global.no_register ? -EINVAL : add_region(vaddr, len, true);
	pthread_mutex_unlock(&lock);
	return rc;
}

EXPORT int
spdk_mem_unregister(void *vaddr, size_t len)
{
	int rc;

	(void)len;
	pthread_mutex_lock(&lock);
	rc = drop_region(vaddr);
	pthread_mutex_unlock(&lock);
	return rc;
}

EXPORT bool
spdk_iommu_is_enabled(void)
{
	return global.iommu != 0;
}

/* ---- controllers ---- */

EXPORT int
spdk_nvme_transport_id_parse(struct spdk_nvme_transport_id *trid, const char *str)
{
	char copy[1000], *word, *rest;

	snprintf(copy, sizeof(copy), "%s", str);
	for (word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
		char *value = strpbrk(word, ":=");

		if (value == NULL) {
			return -EINVAL;
		}
		*value++ = '\0';
		if (!strcmp(word, "trtype")) {
			trid->trtype = !strcasecmp(value, "PCIe")       ? SPDK_NVME_TRANSPORT_PCIE
				       : !strcasecmp(value, "TCP")      ? SPDK_NVME_TRANSPORT_TCP
				       : !strcasecmp(value, "VFIOUSER") ? SPDK_NVME_TRANSPORT_VFIOUSER
									: SPDK_NVME_TRANSPORT_RDMA;
		} else if (!strcmp(word, "traddr")) {
			snprintf(trid->traddr, sizeof(trid->traddr), "%s", value);
		} else if (!strcmp(word, "subnqn")) {
			snprintf(trid->subnqn, sizeof(trid->subnqn), "%s", value);
		}
	}
	return 0;
}

EXPORT struct spdk_nvme_ctrlr *
spdk_nvme_connect(const struct spdk_nvme_transport_id *trid, const struct spdk_nvme_ctrlr_opts *opts, size_t opts_size)
{
	struct spdk_nvme_ctrlr *controller = calloc(1, sizeof(*controller));

	(void)opts;
	(void)opts_size;
	if (!is_started) {
		offend("connect before the environment was started");
	}
	pthread_mutex_lock(&lock);
	controller->drive = find(trid->subnqn[0] ? trid->subnqn : trid->traddr);
	while (controller->drive && controller->drive->set.connect_held) {
		pthread_cond_wait(&changed, &lock);
	}
	pthread_mutex_unlock(&lock);
	controller->fd = controller->drive ? open(controller->drive->path, O_RDWR | O_CLOEXEC) : -1;
	if (controller->fd < 0) {
		log_error("Failed to connect to %s\n", trid->traddr);
		free(controller);
		return NULL;
	}
	controller->is_pcie = trid->trtype == SPDK_NVME_TRANSPORT_PCIE;
	controller->ns.controller = controller;
	return controller;
}

EXPORT int
spdk_nvme_detach(struct spdk_nvme_ctrlr *ctrlr)
{
	pthread_mutex_lock(&lock);
	while (ctrlr->drive->set.detach_held) {
		pthread_cond_wait(&changed, &lock);
	}
	pthread_mutex_unlock(&lock);
	close(ctrlr->fd);
	free(ctrlr);
	return 0;
}

EXPORT struct spdk_nvme_ns *
spdk_nvme_ctrlr_get_ns(struct spdk_nvme_ctrlr *ctrlr, uint32_t ns_id)
{
	ctrlr->ns.is_active = ns_id <= ctrlr->drive->set.namespaces;
	return &ctrlr->ns;
}

EXPORT int32_t
spdk_nvme_ctrlr_process_admin_completions(struct spdk_nvme_ctrlr *ctrlr)
{
	int32_t rc;

	pthread_mutex_lock(&lock);
	ctrlr->drive->set.admin_polls++;
	rc = ctrlr->drive->set.removed_admin ? -ENXIO : 0;
	pthread_mutex_unlock(&lock);
	return rc;
}

EXPORT bool
spdk_nvme_ns_is_active(struct spdk_nvme_ns *ns)
{
	return ns->is_active;
}

EXPORT uint32_t
spdk_nvme_ns_get_sector_size(struct spdk_nvme_ns *ns)
{
	return ns->controller->drive->lba_bytes;
}

EXPORT uint64_t
spdk_nvme_ns_get_num_sectors(struct spdk_nvme_ns *ns)
{
	return ns->controller->drive->bytes / ns->controller->drive->lba_bytes;
}

EXPORT uint32_t
spdk_nvme_ns_get_md_size(struct spdk_nvme_ns *ns)
{
	return ns->controller->drive->metadata_bytes;
}

EXPORT uint32_t
spdk_nvme_ns_get_max_io_xfer_size(struct spdk_nvme_ns *ns)
{
	return ns->controller->drive->transfer_bytes;
}

EXPORT uint32_t
spdk_nvme_ns_get_flags(struct spdk_nvme_ns *ns)
{
	return ns->controller->drive->set.no_flush ? 0 : SPDK_NVME_NS_FLUSH_SUPPORTED;
}

/* ---- queue pairs ---- */

static void
carry_out(struct spdk_nvme_qpair *qpair, struct command *command)
{
	struct drive *drive = qpair->controller->drive;
	struct settings *set = &drive->set;
	off_t at = (off_t)(command->lba * drive->lba_bytes);
	size_t bytes = (size_t)command->count * drive->lba_bytes;
	ssize_t moved = (ssize_t)bytes;

	if (command->kind == 'f') {
		command->sc = (uint8_t)set->flush_sc;
		return;
	}
	if ((long)command->lba < set->fail_to && (long)(command->lba + command->count) > set->fail_from) {
		command->sct = (uint8_t)set->sct;
		command->sc = (uint8_t)set->sc;
		return;
	}
	pthread_mutex_unlock(&lock);
	moved = command->kind == 'r' ? pread(qpair->controller->fd, command->payload, bytes, at)
				     : pwrite(qpair->controller->fd, command->payload, bytes, at);
	pthread_mutex_lock(&lock);
	if (moved != (ssize_t)bytes) {
		command->sct = 2;
		command->sc = 0x81;
	}
}

static struct command *
next_command(struct spdk_nvme_qpair *qpair)
{
	struct command *newest = NULL;
	int i;

	for (i = 0; i < COMMANDS_MAX; i++) {
		struct command *command = &qpair->commands[i];

		if (command->state == 1 && (newest == NULL || command->order > newest->order)) {
			newest = command;
		}
	}
	return newest;
}

/* Newest first: no caller may rely on an order. */
static void *
drive_thread(void *argument)
{
	struct spdk_nvme_qpair *qpair = argument;
	struct settings *set = &qpair->controller->drive->set;

	pthread_mutex_lock(&lock);
	while (!qpair->is_stopping) {
		struct command *command = set->held || set->removed ? NULL : next_command(qpair);

		if (command == NULL) {
			pthread_cond_wait(&changed, &lock);
			continue;
		}
		command->state = 2;
		if (set->delay_us) {
			long delay_us = set->delay_us;

			pthread_mutex_unlock(&lock);
			usleep((useconds_t)delay_us);
			pthread_mutex_lock(&lock);
		}
		carry_out(qpair, command);
		command->state = 3;
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

EXPORT struct spdk_nvme_qpair *
spdk_nvme_ctrlr_alloc_io_qpair(struct spdk_nvme_ctrlr *ctrlr, const struct spdk_nvme_io_qpair_opts *opts,
			       size_t opts_size)
{
	struct spdk_nvme_qpair *qpair;

	(void)opts;
	(void)opts_size;
	if (ctrlr->drive->set.no_queue) {
		return NULL;
	}
	qpair = calloc(1, sizeof(*qpair));
	qpair->controller = ctrlr;
	qpair->owner = pthread_self();
	pthread_create(&qpair->drive, NULL, drive_thread, qpair);
	return qpair;
}

static void
check_owner(struct spdk_nvme_qpair *qpair)
{
	if (!pthread_equal(qpair->owner, pthread_self())) {
		offend("a queue pair was used by two threads");
	}
}

static void
complete(struct command *command, uint8_t sct, uint8_t sc)
{
	struct spdk_nvme_cpl completion = { .status = { .sct = sct, .sc = sc } };
	spdk_nvme_cmd_cb callback = command->callback;
	void *argument = command->argument;

	command->state = 0;
	pthread_mutex_unlock(&lock);
	callback(argument, &completion);
	pthread_mutex_lock(&lock);
}

EXPORT int
spdk_nvme_ctrlr_free_io_qpair(struct spdk_nvme_qpair *qpair)
{
	int i;

	check_owner(qpair);
	pthread_mutex_lock(&lock);
	qpair->is_stopping = true;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	pthread_join(qpair->drive, NULL);
	pthread_mutex_lock(&lock);
	for (i = 0; i < COMMANDS_MAX && !qpair->controller->drive->set.silent; i++) {
		if (qpair->commands[i].state) {
			complete(&qpair->commands[i], 0, ABORTED_SQ_DELETION);
		}
	}
	pthread_mutex_unlock(&lock);
	free(qpair);
	return 0;
}

EXPORT int32_t
spdk_nvme_qpair_process_completions(struct spdk_nvme_qpair *qpair, uint32_t max_completions)
{
	int32_t count = 0;
	int i;

	(void)max_completions;
	check_owner(qpair);
	pthread_mutex_lock(&lock);
	if (qpair->controller->drive->set.removed) {
		pthread_mutex_unlock(&lock);
		log_error("CQ transport error on qpair id %d\n", 1);
		return -ENXIO;
	}
	for (i = 0; i < COMMANDS_MAX; i++) {
		if (qpair->commands[i].state == 3) {
			complete(&qpair->commands[i], qpair->commands[i].sct, qpair->commands[i].sc);
			count++;
		}
	}
	pthread_mutex_unlock(&lock);
	return count;
}

static bool
is_dma_memory(const struct spdk_nvme_ctrlr *controller, const char *start, size_t bytes)
{
	bool is_registered = false;
	int i = 0;

	while (bytes && i < REGIONS_MAX) {
		if (regions[i].start && regions[i].start <= start && start < regions[i].end) {
			size_t here = (size_t)(regions[i].end - start);

			is_registered |= regions[i].is_registered;
			here = here < bytes ? here : bytes;
			start += here;
			bytes -= here;
			i = 0;
		} else {
			i++;
		}
	}
	controller->drive->set.direct += is_registered && bytes == 0;
	return bytes == 0;
}

static void
check_transfer(struct spdk_nvme_ctrlr *controller, void *payload, uint64_t lba, uint32_t count)
{
	struct drive *drive = controller->drive;
	long bytes = (long)count * drive->lba_bytes;

	if (count == 0 || bytes > drive->transfer_bytes || (lba + count) * drive->lba_bytes > drive->bytes) {
		offend("a transfer beyond the limits of the drive");
	}
	if (!is_dma_memory(controller, payload, (size_t)bytes) && controller->is_pcie) {
		offend("a PCIe drive was given memory that it cannot use");
	}
	drive->set.largest = bytes > drive->set.largest ? bytes : drive->set.largest;
}

static int
give(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, char kind, void *payload, uint64_t lba, uint32_t count,
     spdk_nvme_cmd_cb callback, void *argument)
{
	struct settings *set = &ns->controller->drive->set;
	int i;

	check_owner(qpair);
	pthread_mutex_lock(&lock);
	for (i = 0; i < COMMANDS_MAX && qpair->commands[i].state; i++) {
	}
	if (set->busy_submits > 0 || i == COMMANDS_MAX) {
		set->busy_submits -= set->busy_submits > 0;
		pthread_mutex_unlock(&lock);
		return -ENOMEM;
	}
	if (kind != 'f') {
		check_transfer(ns->controller, payload, lba, count);
	}
	set->reads += kind == 'r';
	set->writes += kind == 'w';
	set->flushes += kind == 'f';
	qpair->commands[i] = (struct command){ kind, payload, lba, count, callback, argument, 0, 0, 1, qpair->next_order++ };
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	return 0;
}

EXPORT int
spdk_nvme_ns_cmd_read(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, void *payload, uint64_t lba,
		      uint32_t lba_count, spdk_nvme_cmd_cb cb_fn, void *cb_arg, uint32_t io_flags)
{
	(void)io_flags;
	return give(ns, qpair, 'r', payload, lba, lba_count, cb_fn, cb_arg);
}

EXPORT int
spdk_nvme_ns_cmd_write(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, void *payload, uint64_t lba,
		       uint32_t lba_count, spdk_nvme_cmd_cb cb_fn, void *cb_arg, uint32_t io_flags)
{
	(void)io_flags;
	return give(ns, qpair, 'w', payload, lba, lba_count, cb_fn, cb_arg);
}

EXPORT int
spdk_nvme_ns_cmd_flush(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, spdk_nvme_cmd_cb cb_fn, void *cb_arg)
{
	return give(ns, qpair, 'f', NULL, 0, 0, cb_fn, cb_arg);
}

EXPORT const char *
spdk_nvme_cpl_get_status_string(const struct spdk_nvme_status *status)
{
	return status->sct == 2 && status->sc == 0x81 ? "UNRECOVERED READ ERROR" : "OTHER";
}

EXPORT const char *
spdk_nvme_cpl_get_status_type_string(const struct spdk_nvme_status *status)
{
	return status->sct == 2 ? "MEDIA ERROR" : "GENERIC";
}
