/* Stand-in for tests: what the shim uses of SPDK's NVMe driver, with the prototypes of SPDK 23 to 26. */
#ifndef STANDIN_NVME_H
#define STANDIN_NVME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum spdk_nvme_transport_type {
	SPDK_NVME_TRANSPORT_PCIE = 256,
	SPDK_NVME_TRANSPORT_RDMA = 1,
	SPDK_NVME_TRANSPORT_TCP = 3,
	SPDK_NVME_TRANSPORT_VFIOUSER = 1024,
};

struct spdk_nvme_transport_id {
	enum spdk_nvme_transport_type trtype;
	char traddr[257];
	char trsvcid[33];
	char subnqn[224];
};

struct spdk_nvme_status {
	uint16_t p : 1;
	uint16_t sc : 8;
	uint16_t sct : 3;
	uint16_t crd : 2;
	uint16_t m : 1;
	uint16_t dnr : 1;
};

struct spdk_nvme_cpl {
	uint32_t cdw0;
	uint32_t cdw1;
	uint16_t sqhd;
	uint16_t sqid;
	uint16_t cid;
	union {
		uint16_t status_raw;
		struct spdk_nvme_status status;
	};
};

#define spdk_nvme_cpl_is_error(cpl) ((cpl)->status.sc != 0 || (cpl)->status.sct != 0)

enum spdk_nvme_ns_flags { SPDK_NVME_NS_FLUSH_SUPPORTED = 1 << 1 };

struct spdk_nvme_ctrlr;
struct spdk_nvme_ctrlr_opts;
struct spdk_nvme_io_qpair_opts;
struct spdk_nvme_ns;
struct spdk_nvme_qpair;

typedef void (*spdk_nvme_cmd_cb)(void *ctx, const struct spdk_nvme_cpl *cpl);

int spdk_nvme_transport_id_parse(struct spdk_nvme_transport_id *trid, const char *str);
struct spdk_nvme_ctrlr *spdk_nvme_connect(const struct spdk_nvme_transport_id *trid,
					  const struct spdk_nvme_ctrlr_opts *opts, size_t opts_size);
int spdk_nvme_detach(struct spdk_nvme_ctrlr *ctrlr);
struct spdk_nvme_ns *spdk_nvme_ctrlr_get_ns(struct spdk_nvme_ctrlr *ctrlr, uint32_t ns_id);
int32_t spdk_nvme_ctrlr_process_admin_completions(struct spdk_nvme_ctrlr *ctrlr);
struct spdk_nvme_qpair *spdk_nvme_ctrlr_alloc_io_qpair(struct spdk_nvme_ctrlr *ctrlr,
						       const struct spdk_nvme_io_qpair_opts *opts, size_t opts_size);
int spdk_nvme_ctrlr_free_io_qpair(struct spdk_nvme_qpair *qpair);
int32_t spdk_nvme_qpair_process_completions(struct spdk_nvme_qpair *qpair, uint32_t max_completions);
bool spdk_nvme_ns_is_active(struct spdk_nvme_ns *ns);
uint32_t spdk_nvme_ns_get_sector_size(struct spdk_nvme_ns *ns);
uint64_t spdk_nvme_ns_get_num_sectors(struct spdk_nvme_ns *ns);
uint32_t spdk_nvme_ns_get_md_size(struct spdk_nvme_ns *ns);
uint32_t spdk_nvme_ns_get_max_io_xfer_size(struct spdk_nvme_ns *ns);
uint32_t spdk_nvme_ns_get_flags(struct spdk_nvme_ns *ns);
int spdk_nvme_ns_cmd_read(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, void *payload, uint64_t lba,
			  uint32_t lba_count, spdk_nvme_cmd_cb cb_fn, void *cb_arg, uint32_t io_flags);
int spdk_nvme_ns_cmd_write(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, void *payload, uint64_t lba,
			   uint32_t lba_count, spdk_nvme_cmd_cb cb_fn, void *cb_arg, uint32_t io_flags);
int spdk_nvme_ns_cmd_flush(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, spdk_nvme_cmd_cb cb_fn,
			   void *cb_arg);
const char *spdk_nvme_cpl_get_status_string(const struct spdk_nvme_status *status);
const char *spdk_nvme_cpl_get_status_type_string(const struct spdk_nvme_status *status);

#endif
