// cuda/staging.cc over a driver that copies as late as it may: when an event behind the copy is waited for. Prints the most copies that
// were under way at once.
#include "tvm_infer/cuda/staging.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/error.h"
#include "tvm_infer/schedule/plan.h"

namespace {

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}
void Expect(bool condition, const char* what) {
  if (!condition) Fail(what);
}

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};

struct FakeDriver {
  std::mutex mutex;
  std::deque<Copy> pending;  // one stream for all
  size_t num_done = 0, num_events = 0, most_pending = 0, num_synchronized = 0;
  std::map<void*, size_t> event_after;  // copies that an event stands behind
  std::map<void*, size_t> pinned;
  bool is_capturing = false, records_fail = false;

  void Finish(size_t count) {
    for (; num_done < count; ++num_done) {
      const Copy copy = pending.front();
      pending.pop_front();
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
} fake;

int EventCreate(void** event, unsigned) {
  const std::lock_guard<std::mutex> lock(fake.mutex);
  *event = reinterpret_cast<void*>(++fake.num_events);
  return 0;
}
int EventRecord(void* event, void*) {
  const std::lock_guard<std::mutex> lock(fake.mutex);
  if (fake.records_fail) return 999;
  fake.event_after[event] = fake.num_done + fake.pending.size();
  return 0;
}
int EventSynchronize(void* event) {
  const std::lock_guard<std::mutex> lock(fake.mutex);
  fake.Finish(fake.event_after.at(event));
  return 0;
}
int StreamSynchronize(void*) {
  const std::lock_guard<std::mutex> lock(fake.mutex);
  ++fake.num_synchronized;
  fake.Finish(fake.num_done + fake.pending.size());
  return 0;
}
int HostAlloc(void** pointer, size_t bytes, unsigned) {
  const std::lock_guard<std::mutex> lock(fake.mutex);
  *pointer = std::malloc(bytes);
  fake.pinned[*pointer] = bytes;
  return 0;
}
int FreeHost(void* pointer) {
  const std::lock_guard<std::mutex> lock(fake.mutex);
  for (const Copy& copy : fake.pending) Expect(copy.from != pointer, "memory was freed under a copy");
  Expect(fake.pinned.erase(pointer) == 1, "memory was freed that was not allocated");
  std::free(pointer);
  return 0;
}
int CopyAsync(tvm_infer::cuda::DevicePointer to, const void* from, size_t bytes, void*) {
  const std::lock_guard<std::mutex> lock(fake.mutex);
  const auto slot = fake.pinned.find(const_cast<void*>(from));
  Expect(slot != fake.pinned.end() && bytes <= slot->second, "a copy is not from pinned memory");
  fake.pending.push_back({reinterpret_cast<char*>(to), static_cast<const char*>(from), bytes});
  fake.most_pending = std::max(fake.most_pending, fake.pending.size());
  return 0;
}

}  // namespace

namespace tvm_infer::cuda {

const DriverApi& Driver() {
  static const DriverApi api = [] {
    DriverApi a{};
    a.cuEventCreate = EventCreate;
    a.cuEventRecord = EventRecord;
    a.cuEventSynchronize = EventSynchronize;
    a.cuStreamSynchronize = StreamSynchronize;
    a.cuMemHostAlloc = HostAlloc;
    a.cuMemFreeHost = FreeHost;
    a.cuMemcpyHtoDAsync_v2 = CopyAsync;
    return a;
  }();
  return api;
}
void CheckDriver(int code, const char* what) {
  if (code != 0) TVM_INFER_THROW(DeviceError) << what << " failed";
}
DeviceGuard::DeviceGuard(int32_t) {}
DeviceGuard::~DeviceGuard() {}
bool IsCapturing(void*) { return fake.is_capturing; }

}  // namespace tvm_infer::cuda

namespace {

using tvm_infer::PlanHeader;
using Buffer = std::vector<int64_t>;  // aligned as plans are, in pairs

constexpr size_t kDeviceBytes = 512 * 1024;

// A plan of `bytes`, filled with `seed`.
void WritePlan(Buffer* buffer, size_t bytes, int64_t seed) {
  std::fill(buffer->begin(), buffer->end(), seed);
  auto* header = reinterpret_cast<PlanHeader*>(buffer->data());
  *header = PlanHeader{};
  header->magic = tvm_infer::kPlanMagic;
  header->version = tvm_infer::kPlanVersion;
  header->bytes_used = static_cast<int32_t>(bytes);
}

void Upload(const Buffer& host, Buffer* device, size_t device_bytes = kDeviceBytes) {
  tvm_infer::cuda::UploadPlan(0, nullptr, host.data(), static_cast<int64_t>(host.size() * 8), device->data(),
                              static_cast<int64_t>(device_bytes));
}

// Uploads plans as fast as it can, over and over from one host buffer.
void UploadMany(int32_t thread, int32_t count, std::vector<Buffer>* devices) {
  Buffer host(kDeviceBytes / 8);
  for (int32_t i = 0; i < count; ++i) {
    const size_t bytes = 1024 + 16 * static_cast<size_t>((i * 977 + thread * 131) % 30000);
    WritePlan(&host, bytes, thread * 1000 + i + 1);
    Upload(host, &(*devices)[i]);
  }
}

void CheckMany(int32_t thread, const std::vector<Buffer>& devices) {
  for (size_t i = 0; i < devices.size(); ++i) {
    const size_t words = reinterpret_cast<const PlanHeader*>(devices[i].data())->bytes_used / 8;
    Expect(words >= 128, "a plan did not arrive");
    for (size_t w = sizeof(PlanHeader) / 8; w < devices[i].size(); ++w) {
      const int64_t expected = w < words ? thread * 1000 + static_cast<int64_t>(i) + 1 : -1;
      if (devices[i][w] != expected) Fail(w < words ? "a copy was overwritten under way" : "more than the plan was copied");
    }
  }
}

void ExpectError(const char* kind, const char* word, const std::function<void()>& call) {
  try {
    call();
  } catch (const tvm_infer::Error& error) {
    Expect(error.kind() == kind, ("not a " + std::string(kind) + ": " + error.what()).c_str());
    Expect(std::strstr(error.what(), word) != nullptr, error.what());
    return;
  }
  Fail(std::string("no ") + kind);
}

}  // namespace

int main() {
  constexpr int32_t kThreads = 3, kPlans = 40;
  std::vector<std::vector<Buffer>> devices(kThreads, std::vector<Buffer>(kPlans, Buffer(kDeviceBytes / 8, -1)));
  UploadMany(0, kPlans, &devices[0]);
  std::vector<std::thread> threads;
  for (int32_t t = 1; t < kThreads; ++t) threads.emplace_back(UploadMany, t, kPlans, &devices[t]);
  for (std::thread& thread : threads) thread.join();
  Expect(fake.num_synchronized == 0, "an upload waited for the stream");
  fake.Finish(fake.num_done + fake.pending.size());
  for (int32_t t = 0; t < kThreads; ++t) CheckMany(t, devices[t]);

  Buffer host(1024), device(1024, -1);
  WritePlan(&host, 4096, 7);
  const size_t before = fake.num_done;
  ExpectError("WorkspaceError", "`plan_device` has 4080 bytes; this plan uses 4096", [&] { Upload(host, &device, 4080); });
  fake.is_capturing = true;
  ExpectError("DeviceError", "captured", [&] { Upload(host, &device, 8192); });
  fake.is_capturing = false;
  reinterpret_cast<PlanHeader*>(host.data())->bytes_used = 8192 + 16;
  ExpectError("PlanMismatchError", "8208 bytes but has 8192", [&] { Upload(host, &device); });
  reinterpret_cast<PlanHeader*>(host.data())->version += 1;
  ExpectError("PlanMismatchError", "version", [&] { Upload(host, &device); });
  host[0] = 0;
  ExpectError("PlanMismatchError", "not a plan", [&] { Upload(host, &device); });
  Expect(fake.num_done + fake.pending.size() == before, "a refused plan was copied");
  WritePlan(&host, 4096, 7);
  fake.records_fail = true;
  ExpectError("DeviceError", "cuEventRecord", [&] { Upload(host, &device, 8192); });
  Expect(fake.num_synchronized == 1 && fake.pending.empty(), "nothing guards the memory of a copy under way");
  std::printf("%zu\n", fake.most_pending);
}
