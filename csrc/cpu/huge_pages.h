// Huge pages for large results: those are touched first by the kernel, page by page, 250 faults a
// MB, a tenth of the time of a backward that returns a full bias gradient.
#pragma once

#include <cstdint>
#include <string>

namespace fastattn {

// Asks for huge pages inside [data, data + bytes), where that is several of them and they come
// cheaply. Not so in a virtual machine whose balloon reports free pages: the host takes free huge
// pages away within seconds and gives them back 4 KB at a time. An LSTM's training step whose
// tensors fell on such pages took 1.4 times as long, once in every two seconds.
void ask_for_huge_pages(const void* data, int64_t bytes);

// Whether one of the devices of this driver has negotiated free page reporting; `driver` is
// /sys/bus/virtio/drivers/virtio_balloon where that is there.
bool balloon_reports_free_pages(const std::string& driver);

}  // namespace fastattn
