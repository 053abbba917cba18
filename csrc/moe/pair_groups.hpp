#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kt {

// The pairs of token and expert, sorted by expert; within an expert, tokens stay in order.
struct PairGroups {
  // The pairs of one expert: `count` of them from the first on.
  struct Active {
    size_t expert, first, count;
  };
  // A few pairs of one expert: what is done to rows is cut into these.
  struct Block {
    size_t active, first, count;
  };
  static constexpr size_t kBlockRows = 64;

  std::vector<size_t> start;    // [experts + 1]
  std::vector<Active> active;   // ascending
  std::vector<Block> blocks;    // in the order of the pairs
  std::vector<int32_t> tokens;  // of each pair
  std::vector<float> weights;   // of each pair
  std::vector<size_t> slots;    // of each pair: token * top_k + k

  void Group(const int64_t* expert_ids, const float* routing, size_t num_tokens, size_t top_k,
             size_t experts);
};

}  // namespace kt
