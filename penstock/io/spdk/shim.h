/* The ABI between Penstock and the shim that is compiled against the user's SPDK: no type or symbol of SPDK is in it.
 *
 * Threads: psp_submit and psp_poll are for one thread at a time per device; psp_wake, psp_flush and the memory
 * functions are for any thread. Errors are negative error numbers; what went wrong is written to `error` as text.
 * Whatever changes here changes PSP_ABI.
 */
#ifndef PENSTOCK_SPDK_SHIM_H
#define PENSTOCK_SPDK_SHIM_H

#include <stddef.h>
#include <stdint.h>

#define PSP_ABI 1
#define PSP_EXPORT __attribute__((visibility("default")))
#define PSP_TEXT_BYTES 240

enum { PSP_READ = 0, PSP_WRITE = 1 };
enum { PSP_DIRECT = 1 };                            /* psp_op.flags: the device may use this memory itself */
enum { PSP_PCIE = 0, PSP_VFIO_USER = 1, PSP_TCP = 2, PSP_RDMA = 3, PSP_OTHER = 4 };

struct psp_environment {
	const char *cores;                          /* DPDK's core list, "[0]" */
	int32_t memory_mib;                         /* -1: SPDK's default */
	uint32_t no_pci;
	uint32_t no_huge;
	uint32_t hugepage_single_segments;
	const char *const *pci_allowed;
	uint32_t pci_allowed_count;
};

struct psp_target {
	const char *transport_id;                   /* "trtype:TCP ..." as SPDK parses it */
	uint32_t namespace_id;
	int32_t cpu;                                /* the polling thread's own core; -1: no core, it yields */
	uint32_t depth;
	uint32_t bounce_bytes_max;
	uint64_t timeout_ns;
};

struct psp_info {
	uint64_t size_bytes;
	uint32_t lba_bytes;
	uint32_t piece_bytes;                       /* larger operations go out in pieces of this size */
	uint32_t transport;                         /* PSP_PCIE ... */
	uint32_t iommu;                             /* 1: any memory can be registered with a PCIe drive */
	uint32_t bounce_slots;                      /* pieces of unregistered memory that go out at once; 0: no limit */
	uint32_t has_flush;                         /* 0: the drive has no volatile cache to flush */
};

struct psp_op {
	uint64_t id;
	uint64_t offset_bytes;
	uint64_t length_bytes;
	void *buffer;
	uint32_t kind;                              /* PSP_READ, PSP_WRITE */
	uint32_t flags;
};

struct psp_done {
	uint64_t id;
	int32_t error;                              /* 0 or a positive errno */
	char text[PSP_TEXT_BYTES];                  /* of an error: NVMe status or why the controller is lost */
};

struct psp_device;

PSP_EXPORT uint32_t psp_abi(void);
PSP_EXPORT const char *psp_built_against(void);

/* Once per process; -EALREADY afterwards. */
PSP_EXPORT int psp_environment_start(const struct psp_environment *options, char *error, size_t error_bytes);

/* Memory of a multiple of 2 MiB, aligned to it, that stays in place until it is unregistered. */
PSP_EXPORT int psp_memory_register(void *address, uint64_t bytes);
PSP_EXPORT int psp_memory_unregister(void *address, uint64_t bytes);

/* Connects on the device's own polling thread. */
PSP_EXPORT int psp_open(const struct psp_target *target, struct psp_device **device, struct psp_info *info, char *error,
			size_t error_bytes);
/* All of `ops` or none: -EAGAIN where they are more than the depth leaves room for. */
PSP_EXPORT int psp_submit(struct psp_device *device, const struct psp_op *ops, uint32_t count);
/* How many of `out` were filled; waits for the first one, for psp_wake, or until the time is over. */
PSP_EXPORT int psp_poll(struct psp_device *device, struct psp_done *out, uint32_t count_max, uint64_t timeout_ns);
PSP_EXPORT void psp_wake(struct psp_device *device);
PSP_EXPORT int psp_flush(struct psp_device *device, uint64_t timeout_ns, char *error, size_t error_bytes);
/* Detaches. -EBUSY with operations in flight, and nothing has happened; -ETIMEDOUT where detaching takes longer: the
 * device ends and frees itself later. The device must not be used after 0 or -ETIMEDOUT. */
PSP_EXPORT int psp_close(struct psp_device *device, uint64_t timeout_ns);

#endif
