/* Operations into NVMe commands and back: pieces, bounce buffers, flush, and the end of all when the controller is lost. */
#include "shim_device.h"

#define STARVED_NS (5 * NS_PER_S)                   /* SPDK refuses requests although none is open */

static void
fail(struct operation *operation, int number, const char *text)
{
	if (operation->error == 0) {
		operation->error = number;
		snprintf(operation->text, sizeof(operation->text), "%s", text);
	}
}

static void
give_back(struct psp_device *device, struct piece *piece)
{
	if (piece->bounce) {
		device->free_bounces[device->free_bounce_count++] = piece->bounce;
		piece->bounce = NULL;
	}
	piece->is_open = false;
	device->free_pieces[device->free_pieces_count++] = piece;
}

static void
release(struct psp_device *device, struct operation *operation)
{
	if (--operation->holds == 0) {
		psp_list_push(&device->finished, operation);
	}
}

static void
end_piece(struct piece *piece)
{
	struct operation *operation = piece->operation;

	give_back(piece->device, piece);
	release(piece->device, operation);
}

static void
describe_status(const struct spdk_nvme_cpl *completion, char *text, size_t text_bytes)
{
	snprintf(text, text_bytes, "NVMe status %s: %s (sct 0x%x, sc 0x%x)",
		 spdk_nvme_cpl_get_status_type_string(&completion->status),
		 spdk_nvme_cpl_get_status_string(&completion->status), completion->status.sct, completion->status.sc);
}

static void
on_transfer(void *argument, const struct spdk_nvme_cpl *completion)
{
	struct piece *piece = argument;
	struct operation *operation = piece->operation;
	struct psp_device *device = piece->device;

	if (!piece->is_open) {
		return;
	}
	if (spdk_nvme_cpl_is_error(completion)) {
		char text[PSP_TEXT_BYTES];

		describe_status(completion, text, sizeof(text));
		fail(operation, device->is_lost ? ENODEV : EIO, device->is_lost ? device->lost_text : text);
	} else if (piece->bounce && operation->op.kind == PSP_READ) {
		memcpy((char *)operation->op.buffer + piece->at_bytes, piece->bounce, piece->length_bytes);
	}
	end_piece(piece);
}

static int
send_piece(struct psp_device *device, struct piece *piece)
{
	const struct psp_op *op = &piece->operation->op;
	void *memory = piece->bounce ? piece->bounce : (char *)op->buffer + piece->at_bytes;
	uint64_t lba = (op->offset_bytes + piece->at_bytes) / device->info.lba_bytes;
	uint32_t count = piece->length_bytes / device->info.lba_bytes;

	if (op->kind == PSP_READ) {
		return spdk_nvme_ns_cmd_read(device->ns, device->queue_pair, memory, lba, count, on_transfer, piece, 0);
	}
	if (piece->bounce) {
		memcpy(piece->bounce, (char *)op->buffer + piece->at_bytes, piece->length_bytes);
	}
	return spdk_nvme_ns_cmd_write(device->ns, device->queue_pair, memory, lba, count, on_transfer, piece, 0);
}

/* False where SPDK has no room now. */
static bool
issue_piece(struct psp_device *device, struct operation *operation)
{
	uint64_t left_bytes = operation->op.length_bytes - operation->issued_bytes;
	struct piece *piece = device->free_pieces[--device->free_pieces_count];
	int rc;

	piece->operation = operation;
	piece->at_bytes = operation->issued_bytes;
	piece->length_bytes = left_bytes < device->info.piece_bytes ? (uint32_t)left_bytes : device->info.piece_bytes;
	piece->bounce = NULL;
	if (device->needs_bounce && !(operation->op.flags & PSP_DIRECT)) {
		piece->bounce = device->free_bounces[--device->free_bounce_count];
	}
	/* SPDK may complete the piece inside the call. */
	piece->is_open = true;
	operation->holds++;
	operation->issued_bytes += piece->length_bytes;
	rc = send_piece(device, piece);
	if (rc == 0) {
		device->starved_since_ns = 0;
		return true;
	}
	operation->holds--;
	operation->issued_bytes -= piece->length_bytes;
	give_back(device, piece);
	if (rc == -ENOMEM || rc == -EAGAIN) {
		if (device->free_pieces_count < PIECES_MAX) {
			return false;
		}
		if (device->starved_since_ns == 0) {
			device->starved_since_ns = psp_now_ns();
		}
		if (psp_now_ns() - device->starved_since_ns < STARVED_NS) {
			return false;
		}
	}
	fail(operation, rc < 0 ? -rc : EIO, rc == -ENOMEM ? "SPDK has no free request" : "SPDK refused the command");
	return true;
}

static bool
has_room(const struct psp_device *device, const struct operation *operation)
{
	bool bounces = device->needs_bounce && !(operation->op.flags & PSP_DIRECT);

	return device->free_pieces_count > 0 && (!bounces || device->free_bounce_count > 0);
}

void
psp_issue(struct psp_device *device)
{
	while (device->to_issue.first) {
		struct operation *operation = device->to_issue.first;

		if (device->is_lost) {
			fail(operation, ENODEV, device->lost_text);
		}
		if (operation->error == 0 && operation->issued_bytes < operation->op.length_bytes) {
			if (!has_room(device, operation) || !issue_piece(device, operation)) {
				return;
			}
		}
		if (operation->error || operation->issued_bytes == operation->op.length_bytes) {
			psp_list_pop(&device->to_issue);
			release(device, operation);
		}
	}
}

static void
end_flush(struct psp_device *device, struct flush *flush, int number, const char *text)
{
	bool is_last;

	pthread_mutex_lock(&device->mutex);
	flush->is_done = true;
	flush->error = number;
	snprintf(flush->text, sizeof(flush->text), "%s", text);
	is_last = --flush->references == 0;
	pthread_cond_broadcast(&device->news);
	pthread_mutex_unlock(&device->mutex);
	if (is_last) {
		free(flush);
	}
}

static void
on_flush(void *argument, const struct spdk_nvme_cpl *completion)
{
	struct psp_device *device = argument;
	struct flush *flush = device->open_flush;
	char text[PSP_TEXT_BYTES] = "";

	if (flush == NULL) {
		return;
	}
	device->open_flush = NULL;
	if (!spdk_nvme_cpl_is_error(completion)) {
		end_flush(device, flush, 0, "");
	} else if (device->is_lost) {
		end_flush(device, flush, ENODEV, device->lost_text);
	} else {
		describe_status(completion, text, sizeof(text));
		end_flush(device, flush, EIO, text);
	}
}

/* One flush is open at a time; those that wait start after it. */
void
psp_start_flush(struct psp_device *device)
{
	struct flush *flush = device->next_flush;
	int rc;

	if (device->open_flush || flush == NULL) {
		return;
	}
	device->next_flush = flush->next;
	if (device->is_lost) {
		end_flush(device, flush, ENODEV, device->lost_text);
		return;
	}
	device->open_flush = flush;
	rc = spdk_nvme_ns_cmd_flush(device->ns, device->queue_pair, on_flush, device);
	if (rc == -ENOMEM || rc == -EAGAIN) {
		device->open_flush = NULL;
		device->next_flush = flush;
	} else if (rc != 0 && device->open_flush) {
		device->open_flush = NULL;
		end_flush(device, flush, rc < 0 ? -rc : EIO, "SPDK refused the flush");
	}
}

void
psp_end_flushes(struct psp_device *device)
{
	while (device->next_flush) {
		struct flush *flush = device->next_flush;

		device->next_flush = flush->next;
		end_flush(device, flush, ENODEV, "the engine is closing");
	}
}

/* Every open command ends with an error: SPDK aborts those it knows of as the queue pair goes, the rest end here. */
void
psp_lose(struct psp_device *device, int rc)
{
	char last[PSP_TEXT_BYTES];
	uint32_t i;

	psp_log_last(last, sizeof(last));
	device->is_lost = true;
	snprintf(device->lost_text, sizeof(device->lost_text), "the controller is lost (%s)%s%.150s", strerror(abs(rc)),
		 last[0] ? ": " : "", last);
	spdk_nvme_ctrlr_free_io_qpair(device->queue_pair);
	device->queue_pair = NULL;
	for (i = 0; i < PIECES_MAX; i++) {
		if (device->pieces[i].is_open) {
			fail(device->pieces[i].operation, ENODEV, device->lost_text);
			end_piece(&device->pieces[i]);
		}
	}
	if (device->open_flush) {
		struct flush *flush = device->open_flush;

		device->open_flush = NULL;
		end_flush(device, flush, ENODEV, device->lost_text);
	}
}
