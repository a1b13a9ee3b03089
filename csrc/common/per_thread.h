// SPDX-License-Identifier: Apache-2.0
//
// Objects of which each thread has one per device: handles, plans, streams.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

namespace slope {

// T is made by T(device), on the thread that first asks. None is ever destroyed: when a thread
// ends, its objects wait for the next thread that asks for their device, so that threads that come
// and go leave nothing behind; and at the end of the process the driver may be gone before they
// are.
template <typename T>
class PerThread {
 public:
  // This thread's object for a device, which must be current.
  static T& get(int device) {
    thread_local Mine mine;
    if (mine.by_device.size() <= static_cast<size_t>(device)) {
      mine.by_device.resize(device + 1, nullptr);
    }
    T*& object = mine.by_device[device];
    if (object == nullptr) [[unlikely]] {
      object = &take(device);
    }
    return *object;
  }

  // Calls use(object) for the objects of all threads; they may be in use meanwhile.
  template <typename Use>
  static void each(Use use) {
    const std::lock_guard lock(pool().mutex);
    for (const auto& owned : pool().all) {
      use(*owned.object);
    }
  }

 private:
  struct Owned {
    int device;
    std::unique_ptr<T> object;
    bool idle;
  };
  struct Pool {
    std::mutex mutex;
    std::vector<Owned> all;
  };
  struct Mine {
    std::vector<T*> by_device;

    ~Mine() {
      const std::lock_guard lock(pool().mutex);
      for (Owned& owned : pool().all) {
        const auto found = std::find(by_device.begin(), by_device.end(), owned.object.get());
        owned.idle = owned.idle || found != by_device.end();
      }
    }
  };

  static Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
  }

  static T& take(int device) {
    const std::lock_guard lock(pool().mutex);
    for (Owned& owned : pool().all) {
      if (owned.idle && owned.device == device) {
        owned.idle = false;
        return *owned.object;
      }
    }
    return *pool().all.emplace_back(Owned{device, std::make_unique<T>(device), false}).object;
  }
};

}  // namespace slope
