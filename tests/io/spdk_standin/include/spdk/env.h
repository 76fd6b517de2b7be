/* Stand-in for tests: what the shim uses of SPDK's environment, with the field names and types of SPDK 23 to 26. */
#ifndef STANDIN_ENV_H
#define STANDIN_ENV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct spdk_pci_addr {
	uint32_t domain;
	uint8_t bus;
	uint8_t dev;
	uint8_t func;
};

struct spdk_env_opts {
	const char *name;
	const char *core_mask;
	int mem_size;
	bool no_pci;
	bool hugepage_single_segments;
#ifndef STANDIN_OLD
	bool no_huge;
#endif
	size_t num_pci_addr;
	struct spdk_pci_addr *pci_allowed;
#ifndef STANDIN_OLD
	size_t opts_size;
#endif
};

void spdk_env_opts_init(struct spdk_env_opts *opts);
int spdk_env_init(const struct spdk_env_opts *opts);
int spdk_pci_addr_parse(struct spdk_pci_addr *addr, const char *bdf);
void *spdk_dma_zmalloc(size_t size, size_t align, uint64_t *unused);
void spdk_dma_free(void *buf);
int spdk_mem_register(void *vaddr, size_t len);
int spdk_mem_unregister(void *vaddr, size_t len);
bool spdk_iommu_is_enabled(void);

#endif
