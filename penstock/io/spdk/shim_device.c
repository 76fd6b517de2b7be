/* What callers reach: open, submit, poll, wake, flush, close; they share bounded lists with the polling thread. */
#include "shim_device.h"

#include <sched.h>

uint64_t
psp_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

struct timespec
psp_at_ns(uint64_t when_ns)
{
	return (struct timespec){ .tv_sec = (time_t)(when_ns / NS_PER_S), .tv_nsec = (long)(when_ns % NS_PER_S) };
}

void
psp_list_init(struct list *list)
{
	list->first = NULL;
	list->last = &list->first;
}

void
psp_list_push(struct list *list, struct operation *operation)
{
	operation->next = NULL;
	*list->last = operation;
	list->last = &operation->next;
}

struct operation *
psp_list_pop(struct list *list)
{
	struct operation *operation = list->first;

	list->first = operation->next;
	if (list->first == NULL) {
		list->last = &list->first;
	}
	return operation;
}

void
psp_list_move(struct list *from, struct list *to)
{
	while (from->first) {
		psp_list_push(to, psp_list_pop(from));
	}
}

void
psp_free_device(struct psp_device *device)
{
	pthread_cond_destroy(&device->work);
	pthread_cond_destroy(&device->news);
	pthread_mutex_destroy(&device->mutex);
	free(device->slots);
	free(device->transport_id);
	free(device);
}

static struct psp_device *
make_device(const struct psp_target *target)
{
	struct psp_device *device = calloc(1, sizeof(*device));
	pthread_condattr_t attributes;
	uint32_t i;

	if (device == NULL) {
		return NULL;
	}
	device->target = *target;
	device->slots = calloc(target->depth, sizeof(*device->slots));
	device->transport_id = strdup(target->transport_id);
	pthread_mutex_init(&device->mutex, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&device->work, &attributes);
	pthread_cond_init(&device->news, &attributes);
	pthread_condattr_destroy(&attributes);
	psp_list_init(&device->inbox);
	psp_list_init(&device->ended);
	psp_list_init(&device->to_issue);
	psp_list_init(&device->finished);
	if (device->slots == NULL || device->transport_id == NULL) {
		psp_free_device(device);
		return NULL;
	}
	for (i = 0; i < target->depth; i++) {
		device->slots[i].next = device->free_slots;
		device->free_slots = &device->slots[i];
	}
	device->free_count = target->depth;
	for (i = 0; i < PIECES_MAX; i++) {
		device->pieces[i].device = device;
		device->free_pieces[device->free_pieces_count++] = &device->pieces[i];
	}
	return device;
}

static int
start_thread(struct psp_device *device, char *error, size_t error_bytes)
{
	pthread_attr_t attributes;
	cpu_set_t cpus;
	int rc;

	pthread_attr_init(&attributes);
	if (device->target.cpu >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET(device->target.cpu % CPU_SETSIZE, &cpus);
		pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus);
	}
	rc = pthread_create(&device->thread, &attributes, psp_run, device);
	pthread_attr_destroy(&attributes);
	if (rc != 0) {
		psp_say(error, error_bytes, "no polling thread on cpu %d: %s", device->target.cpu, strerror(rc));
	}
	return -rc;
}

/* Waits until the thread reached `state` or one after it; false at the deadline, and the thread is on its own then. */
static bool
await_state(struct psp_device *device, enum state state, uint64_t timeout_ns)
{
	struct timespec until = psp_at_ns(psp_now_ns() + timeout_ns);
	bool has_reached;

	pthread_mutex_lock(&device->mutex);
	while (device->state < state && pthread_cond_timedwait(&device->news, &device->mutex, &until) != ETIMEDOUT) {
	}
	has_reached = device->state >= state;
	if (!has_reached) {
		device->is_abandoned = true;
		device->is_stopping = true;
		atomic_store(&device->has_mail, true);
	}
	pthread_mutex_unlock(&device->mutex);
	if (!has_reached) {
		pthread_detach(device->thread);
	}
	return has_reached;
}

int
psp_open(const struct psp_target *target, struct psp_device **opened, struct psp_info *info, char *error,
	 size_t error_bytes)
{
	struct psp_device *device = make_device(target);
	int rc;

	if (device == NULL) {
		psp_say(error, error_bytes, "out of memory");
		return -ENOMEM;
	}
	rc = start_thread(device, error, error_bytes);
	if (rc != 0) {
		psp_free_device(device);
		return rc;
	}
	if (!await_state(device, READY, target->timeout_ns)) {
		psp_say(error, error_bytes, "no answer within %.1f s", (double)target->timeout_ns / NS_PER_S);
		return -ETIMEDOUT;
	}
	pthread_mutex_lock(&device->mutex);
	rc = device->state == READY ? 0 : device->failure_number;
	psp_say(error, error_bytes, "%s", device->failure);
	pthread_mutex_unlock(&device->mutex);
	if (rc != 0) {
		pthread_join(device->thread, NULL);
		psp_free_device(device);
		return rc;
	}
	*info = device->info;
	*opened = device;
	return 0;
}

int
psp_submit(struct psp_device *device, const struct psp_op *ops, uint32_t count)
{
	uint32_t i;

	pthread_mutex_lock(&device->mutex);
	if (count > device->free_count) {
		pthread_mutex_unlock(&device->mutex);
		return -EAGAIN;
	}
	for (i = 0; i < count; i++) {
		struct operation *operation = device->free_slots;

		device->free_slots = operation->next;
		*operation = (struct operation){ .op = ops[i], .holds = 1 };
		psp_list_push(&device->inbox, operation);
	}
	device->free_count -= count;
	atomic_store(&device->has_mail, true);
	pthread_cond_signal(&device->work);
	pthread_mutex_unlock(&device->mutex);
	return 0;
}

int
psp_poll(struct psp_device *device, struct psp_done *out, uint32_t count_max, uint64_t timeout_ns)
{
	struct timespec until = psp_at_ns(psp_now_ns() + timeout_ns);
	uint32_t count = 0;

	pthread_mutex_lock(&device->mutex);
	while (timeout_ns > 0 && !device->ended.first && !device->is_woken &&
	       device->free_count < device->target.depth &&
	       pthread_cond_timedwait(&device->news, &device->mutex, &until) != ETIMEDOUT) {
	}
	device->is_woken = false;
	while (count < count_max && device->ended.first) {
		struct operation *operation = psp_list_pop(&device->ended);

		out[count].id = operation->op.id;
		out[count].error = operation->error;
		memcpy(out[count].text, operation->text, sizeof(operation->text));
		count++;
		operation->next = device->free_slots;
		device->free_slots = operation;
		device->free_count++;
	}
	pthread_mutex_unlock(&device->mutex);
	return (int)count;
}

void
psp_wake(struct psp_device *device)
{
	pthread_mutex_lock(&device->mutex);
	device->is_woken = true;
	pthread_cond_broadcast(&device->news);
	pthread_mutex_unlock(&device->mutex);
}

int
psp_flush(struct psp_device *device, uint64_t timeout_ns, char *error, size_t error_bytes)
{
	struct timespec until = psp_at_ns(psp_now_ns() + timeout_ns);
	struct flush *flush = calloc(1, sizeof(*flush));
	struct flush **last;
	bool is_last;
	int rc;

	if (flush == NULL) {
		psp_say(error, error_bytes, "out of memory");
		return -ENOMEM;
	}
	flush->references = 2;
	pthread_mutex_lock(&device->mutex);
	for (last = &device->flushes; *last; last = &(*last)->next) {
	}
	*last = flush;
	atomic_store(&device->has_mail, true);
	pthread_cond_signal(&device->work);
	while (!flush->is_done && pthread_cond_timedwait(&device->news, &device->mutex, &until) != ETIMEDOUT) {
	}
	rc = flush->is_done ? -flush->error : -ETIMEDOUT;
	psp_say(error, error_bytes, "%s", flush->is_done ? flush->text : "the flush did not end in time");
	is_last = --flush->references == 0;
	pthread_mutex_unlock(&device->mutex);
	if (is_last) {
		free(flush);
	}
	return rc;
}

int
psp_close(struct psp_device *device, uint64_t timeout_ns)
{
	bool is_busy;

	pthread_mutex_lock(&device->mutex);
	is_busy = device->free_count < device->target.depth;
	if (!is_busy) {
		device->is_stopping = true;
		atomic_store(&device->has_mail, true);
		pthread_cond_signal(&device->work);
	}
	pthread_mutex_unlock(&device->mutex);
	if (is_busy) {
		return -EBUSY;
	}
	if (!await_state(device, STOPPED, timeout_ns)) {
		return -ETIMEDOUT;
	}
	pthread_join(device->thread, NULL);
	psp_free_device(device);
	return 0;
}
