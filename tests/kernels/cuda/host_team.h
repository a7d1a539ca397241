// Runs on the host what is written for a team of blocks: each thread is a fiber, which runs until it waits for others.
// The order in which they run is drawn from a seed, so that what depends on it gives other bits, or a deadlock.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "common.cuh"

namespace dpdiff {

class HostBlocks {
 public:
  HostBlocks(int size, int threads, size_t board_floats, unsigned seed)
      : size(size), threads(threads), boards(size), random_(seed), everyone_(size * threads), mail_(2 * size) {
    for (auto& board : boards) board.assign(board_floats, NAN);
    for (int i = 0; i < size; ++i) blocks_.emplace_back(threads);
    for (int i = 0; i < size * threads / 32; ++i) warps_.emplace_back(32);
  }

  // Runs body(rank, thread) in every thread of every block.
  void run(const std::function<void(int, int)>& body) {
    body_ = &body;
    current_instance() = this;
    std::vector<Fiber> fibers(size * threads);
    for (int i = 0; i < size * threads; ++i) {
      fibers[i].stack.reset(new char[kStack]);
      getcontext(&fibers[i].context);
      fibers[i].context.uc_stack.ss_sp = fibers[i].stack.get();
      fibers[i].context.uc_stack.ss_size = kStack;
      fibers[i].context.uc_link = &scheduler_;
      makecontext(&fibers[i].context, reinterpret_cast<void (*)()>(&HostBlocks::enter), 1, i);
    }
    std::vector<int> order(fibers.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
    for (bool progress = true; progress;) {
      progress = false;
      std::shuffle(order.begin(), order.end(), random_);
      for (int i : order) {
        Fiber& fiber = fibers[i];
        if (fiber.done || (fiber.at != nullptr && fiber.at->generation == fiber.generation)) continue;
        progress = true;
        current_ = &fiber;
        swapcontext(&scheduler_, &fiber.context);
      }
    }
    for (const Fiber& fiber : fibers) {
      if (!fiber.done) throw std::runtime_error("deadlock: threads wait for others that have ended or wait elsewhere");
    }
  }

  struct Barrier {
    explicit Barrier(int expected) : expected(expected), slots{std::vector<double>(expected), std::vector<double>(expected)} {}
    int expected, arrived = 0, generation = 0;
    std::vector<double> slots[2];
    int flags[2] = {};
  };
  // Gives x to the others of the barrier; the slots, once all have come, stay for as long as the next isn't complete.
  template <typename T>
  const std::vector<double>& meet(Barrier& barrier, int place, T x) {
    std::vector<double>& slots = barrier.slots[barrier.generation % 2];
    memcpy(&slots[place], &x, sizeof(T));
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.generation;
    } else {
      wait(barrier);
    }
    return slots;
  }
  // Messages of a turn to a block, of which a thread says how many bytes they are, before or after they have come.
  struct Mail {
    Barrier complete{0};
    int64_t missing = 0;
    bool expected = false;
  };
  Mail& mail(int rank, unsigned turn) { return mail_[2 * rank + turn % 2]; }
  void post(Mail& mail, int64_t bytes, bool expected) {
    mail.missing += expected ? bytes : -bytes;
    mail.expected |= expected;
    if (!mail.expected || mail.missing != 0) return;
    mail.expected = false;
    ++mail.complete.generation;
  }
  void receive(Mail& mail, unsigned turn) {
    if (mail.complete.generation == int(turn / 2)) wait(mail.complete);
  }
  Barrier& everyone() { return everyone_; }
  Barrier& block(int rank) { return blocks_[rank]; }
  Barrier& warp(int rank, int thread) { return warps_[(rank * threads + thread) / 32]; }

  const int size, threads;
  std::vector<std::vector<float>> boards;

 private:
  void wait(const Barrier& barrier) {
    current_->at = &barrier;
    current_->generation = barrier.generation;
    swapcontext(&current_->context, &scheduler_);
  }

  static constexpr size_t kStack = 256 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    const Barrier* at = nullptr;
    int generation = 0;
    bool done = false;
  };
  static HostBlocks*& current_instance() {
    static HostBlocks* instance = nullptr;
    return instance;
  }
  static void enter(int i) {
    HostBlocks& self = *current_instance();
    Fiber* fiber = self.current_;
    (*self.body_)(i / self.threads, i % self.threads);
    fiber->done = true;
  }

  std::mt19937 random_;
  Barrier everyone_;
  std::vector<Barrier> blocks_, warps_;
  std::vector<Mail> mail_;
  const std::function<void(int, int)>* body_ = nullptr;
  ucontext_t scheduler_;
  Fiber* current_ = nullptr;
};

// A thread's view of its team: what Cluster is on a GPU.
class HostTeam {
 public:
  HostTeam(HostBlocks& blocks, int rank, int thread) : blocks_(blocks), rank_(rank), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const { return blocks_.threads; }
  int size() const { return blocks_.size; }
  int rank() const { return rank_; }
  float* board() const { return blocks_.boards[rank_].data(); }
  const float* board_of(int rank) const { return blocks_.boards[rank].data(); }

  void expect(unsigned turn, int bytes) const { blocks_.post(blocks_.mail(rank_, turn), bytes, true); }
  void send(int rank, unsigned turn, int at, const Quad& x) const {
    memcpy(&blocks_.boards[rank].at(at), &x, sizeof x);
    blocks_.post(blocks_.mail(rank, turn), sizeof x, false);
  }
  void receive(unsigned turn) const { blocks_.receive(blocks_.mail(rank_, turn), turn); }

  void sync() const { blocks_.meet(blocks_.block(rank_), thread_, 0.0); }
  void sync_all() const { blocks_.meet(blocks_.everyone(), rank_ * threads() + thread_, 0.0); }
  bool sync_or(bool x) const {
    bool any = false;
    for (double other : blocks_.meet(blocks_.block(rank_), thread_, double(x))) any |= other != 0;
    return any;
  }
  template <int kGroup>
  float of_lane(float x, int lane) const {
    return of_warp(x, thread_ % 32 / kGroup * kGroup + lane);
  }
  template <typename T>
  T swap_lanes(T x, int mask) const {
    return of_warp(x, thread_ % 32 ^ mask);
  }

 private:
  template <typename T>
  T of_warp(T x, int lane) const {
    const double slot = blocks_.meet(blocks_.warp(rank_, thread_), thread_ % 32, x)[lane];
    memcpy(&x, &slot, sizeof(T));
    return x;
  }

  HostBlocks& blocks_;
  const int rank_, thread_;
};

}  // namespace dpdiff
