#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kt::hardware {

// A thread that calls functions for accelerators, which ring by writing to memory that both reach.
//
// A stream has a bell: two words on a cache line. To have function number n called it writes 0 to
// `answer`, then n to `request`, and waits until `answer` is n. The thread takes the request away,
// calls, and answers. All three are constants, so a captured graph may ring any number of times.
// One stream may use a bell at a time; there is one thread, so functions are called one by one.
//
// It looks at the words without a pause while there are calls, and less often when there are none.
class Doorbell {
 public:
  struct alignas(64) Bell {
    uint32_t request;
    uint32_t answer;
  };
  using Function = void (*)(void*);

  // `bells` must outlive this, and be zeros.
  Doorbell(Bell* bells, size_t count);
  ~Doorbell();  // nobody may ring any more
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;

  // The number of a function with an argument, from 1 on; the same one for the same pair. It will
  // be rung soon: the thread wakes up.
  uint32_t Number(Function function, void* argument);

 private:
  void Listen();
  bool Answer();

  Bell* const bells_;
  const size_t count_;
  std::mutex mutex_;  // of what follows
  std::vector<std::pair<Function, void*>> functions_;
  std::map<std::pair<Function, void*>, uint32_t> numbers_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> is_expected_{false};
  std::thread thread_;
};

}  // namespace kt::hardware
