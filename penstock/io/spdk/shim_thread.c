/* The polling thread of one namespace: connects, serves until it is told to stop, detaches. */
#include "shim_device.h"

#include <sched.h>

#include <spdk/env.h>

#define ADMIN_EVERY_NS 1000000ull                   /* keep-alive and events of the controller */
#define IDLE_WAIT_NS 5000000ull                     /* an idle thread looks at the admin queue this often */
#define SPIN_IDLE_NS 200000ull                      /* how long a thread with its own core spins without work */
#define YIELDS_BEFORE_SLEEP 64

/* SPDK does not promise that connecting and detaching may overlap. */
static pthread_mutex_t connect_mutex = PTHREAD_MUTEX_INITIALIZER;

static int
make_bounces(struct psp_device *device)
{
	uint32_t wanted = device->target.bounce_bytes_max / device->info.piece_bytes;

	wanted = wanted < 2 ? 2 : wanted > BOUNCE_SLOTS_MAX ? BOUNCE_SLOTS_MAX : wanted;
	while (device->bounce_count < wanted) {
		void *memory = spdk_dma_zmalloc(device->info.piece_bytes, BOUNCE_ALIGNMENT, NULL);

		if (memory == NULL && device->bounce_count >= 2) {
			break;
		}
		if (memory == NULL) {
			return -ENOMEM;
		}
		device->bounces[device->bounce_count++] = memory;
		device->free_bounces[device->free_bounce_count++] = memory;
	}
	device->info.bounce_slots = device->bounce_count;
	return 0;
}

static uint32_t
transport_of(const struct spdk_nvme_transport_id *id)
{
	switch (id->trtype) {
	case SPDK_NVME_TRANSPORT_PCIE:
		return PSP_PCIE;
	case SPDK_NVME_TRANSPORT_VFIOUSER:
		return PSP_VFIO_USER;
	case SPDK_NVME_TRANSPORT_TCP:
		return PSP_TCP;
	case SPDK_NVME_TRANSPORT_RDMA:
		return PSP_RDMA;
	default:
		return PSP_OTHER;
	}
}

static int
refuse(struct psp_device *device, int number, const char *text)
{
	snprintf(device->failure, sizeof(device->failure), "%s", text);
	return -number;
}

static int
identify(struct psp_device *device)
{
	uint32_t transfer_bytes;

	device->ns = spdk_nvme_ctrlr_get_ns(device->controller, device->target.namespace_id);
	if (device->ns == NULL || !spdk_nvme_ns_is_active(device->ns)) {
		snprintf(device->failure, sizeof(device->failure), "the controller has no active namespace %u",
			 device->target.namespace_id);
		return -ENODEV;
	}
	if (spdk_nvme_ns_get_md_size(device->ns) != 0) {
		return refuse(device, EINVAL, "the namespace is formatted with metadata; format it without (nvme format)");
	}
	device->info.lba_bytes = spdk_nvme_ns_get_sector_size(device->ns);
	device->info.size_bytes = spdk_nvme_ns_get_num_sectors(device->ns) * device->info.lba_bytes;
	if (device->info.lba_bytes == 0 || BOUNCE_ALIGNMENT % device->info.lba_bytes != 0) {
		return refuse(device, EINVAL, "the namespace has logical blocks that do not divide 4096 bytes");
	}
	transfer_bytes = spdk_nvme_ns_get_max_io_xfer_size(device->ns) / BOUNCE_ALIGNMENT * BOUNCE_ALIGNMENT;
	if (transfer_bytes == 0) {
		return refuse(device, EINVAL, "the controller takes less than 4096 bytes at once");
	}
	device->info.piece_bytes = transfer_bytes < PIECE_BYTES_MAX ? transfer_bytes : PIECE_BYTES_MAX;
	device->info.has_flush = (spdk_nvme_ns_get_flags(device->ns) & SPDK_NVME_NS_FLUSH_SUPPORTED) != 0;
	device->info.iommu = spdk_iommu_is_enabled();
	return 0;
}

static int
connect_target(struct psp_device *device)
{
	struct spdk_nvme_transport_id id;
	char last[PSP_TEXT_BYTES];
	int rc;

	memset(&id, 0, sizeof(id));
	if (spdk_nvme_transport_id_parse(&id, device->transport_id) != 0) {
		return refuse(device, EINVAL, "SPDK does not understand this address");
	}
	psp_log_clear();
	device->controller = spdk_nvme_connect(&id, NULL, 0);
	if (device->controller == NULL) {
		psp_log_last(last, sizeof(last));
		return refuse(device, ENODEV, last[0] ? last : "no NVMe controller answers there");
	}
	rc = identify(device);
	if (rc != 0) {
		return rc;
	}
	device->info.transport = transport_of(&id);
	device->needs_bounce = device->info.transport != PSP_TCP;
	if (device->needs_bounce && make_bounces(device) != 0) {
		return refuse(device, ENOMEM, "no memory for DMA: reserve huge pages (sysctl vm.nr_hugepages=512)");
	}
	device->queue_pair = spdk_nvme_ctrlr_alloc_io_qpair(device->controller, NULL, 0);
	if (device->queue_pair == NULL) {
		psp_log_last(last, sizeof(last));
		return refuse(device, EIO, last[0] ? last : "the controller gives no I/O queue pair");
	}
	return 0;
}

static void
disconnect_target(struct psp_device *device)
{
	pthread_mutex_lock(&connect_mutex);
	if (device->queue_pair) {
		spdk_nvme_ctrlr_free_io_qpair(device->queue_pair);
		device->queue_pair = NULL;
	}
	while (device->bounce_count > 0) {
		spdk_dma_free(device->bounces[--device->bounce_count]);
	}
	if (device->controller) {
		spdk_nvme_detach(device->controller);
		device->controller = NULL;
	}
	pthread_mutex_unlock(&connect_mutex);
}

/* Takes what callers left; true when the thread shall end. */
static bool
take_mail(struct psp_device *device)
{
	struct flush **last = &device->next_flush;
	struct list taken;
	bool is_stopping;

	if (!atomic_exchange(&device->has_mail, false)) {
		return false;
	}
	psp_list_init(&taken);
	pthread_mutex_lock(&device->mutex);
	psp_list_move(&device->inbox, &taken);
	while (*last) {
		last = &(*last)->next;
	}
	*last = device->flushes;
	device->flushes = NULL;
	is_stopping = device->is_stopping;
	pthread_mutex_unlock(&device->mutex);
	psp_list_move(&taken, &device->to_issue);
	return is_stopping;
}

static void
hand_over(struct psp_device *device)
{
	if (device->finished.first == NULL) {
		return;
	}
	pthread_mutex_lock(&device->mutex);
	psp_list_move(&device->finished, &device->ended);
	pthread_cond_broadcast(&device->news);
	pthread_mutex_unlock(&device->mutex);
}

/* How many commands ended. */
static int
poll_controller(struct psp_device *device)
{
	uint64_t now = psp_now_ns();
	int ended = spdk_nvme_qpair_process_completions(device->queue_pair, 0);
	int rc = ended;

	if (rc >= 0 && now >= device->admin_at_ns) {
		device->admin_at_ns = now + ADMIN_EVERY_NS;
		rc = spdk_nvme_ctrlr_process_admin_completions(device->controller);
	}
	if (rc < 0) {
		psp_lose(device, rc);
		return 1;
	}
	return ended;
}

static void
wait_for_work(struct psp_device *device)
{
	struct timespec until = psp_at_ns(psp_now_ns() + IDLE_WAIT_NS);

	pthread_mutex_lock(&device->mutex);
	if (!atomic_load(&device->has_mail)) {
		pthread_cond_timedwait(&device->work, &device->mutex, &until);
	}
	pthread_mutex_unlock(&device->mutex);
}

static void
serve(struct psp_device *device)
{
	bool has_core = device->target.cpu >= 0;
	uint64_t idle_since_ns = 0;
	uint32_t empty_rounds = 0;

	while (!take_mail(device)) {
		bool is_busy;

		psp_start_flush(device);
		psp_issue(device);
		empty_rounds = !device->is_lost && poll_controller(device) > 0 ? 0 : empty_rounds + 1;
		hand_over(device);
		is_busy = device->to_issue.first || device->free_pieces_count < PIECES_MAX || device->open_flush;
		if (is_busy) {
			idle_since_ns = 0;
			if (!has_core && empty_rounds > 0) {
				if (empty_rounds < YIELDS_BEFORE_SLEEP) {
					sched_yield();
				} else {
					nanosleep(&(struct timespec){ .tv_nsec = 20000 }, NULL);
				}
			}
			continue;
		}
		if (idle_since_ns == 0) {
			idle_since_ns = psp_now_ns();
		}
		if (!has_core || device->is_lost || psp_now_ns() - idle_since_ns > SPIN_IDLE_NS) {
			wait_for_work(device);
		}
	}
}

/* True when the device has no owner any more. */
static bool
enter_state(struct psp_device *device, enum state state, int number)
{
	bool is_abandoned;

	pthread_mutex_lock(&device->mutex);
	is_abandoned = device->is_abandoned;
	device->state = state;
	device->failure_number = number;
	pthread_cond_broadcast(&device->news);
	pthread_mutex_unlock(&device->mutex);
	return is_abandoned;
}

void *
psp_run(void *argument)
{
	struct psp_device *device = argument;
	bool is_abandoned;
	int rc;

	pthread_setname_np(pthread_self(), "penstock-spdk");
	pthread_mutex_lock(&connect_mutex);
	rc = connect_target(device);
	pthread_mutex_unlock(&connect_mutex);
	if (rc == 0 && !enter_state(device, READY, 0)) {
		serve(device);
	}
	disconnect_target(device);
	psp_end_flushes(device);
	is_abandoned = enter_state(device, rc == 0 ? STOPPED : FAILED, rc);
	if (is_abandoned) {
		psp_free_device(device);
	}
	return NULL;
}
