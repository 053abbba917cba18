#include "moe/pair_groups.hpp"

#include <algorithm>

namespace kt {

void PairGroups::Group(const int64_t* expert_ids, const float* routing, size_t num_tokens,
                       size_t top_k, size_t experts) {
  const size_t pairs = num_tokens * top_k;
  start.assign(experts + 1, 0);
  active.clear();
  blocks.clear();
  for (size_t i = 0; i < pairs; ++i)
    if (expert_ids[i] >= 0) ++start[static_cast<size_t>(expert_ids[i]) + 1];
  for (size_t e = 0; e < experts; ++e) {
    const size_t count = start[e + 1];
    for (size_t at = 0; at < count; at += kBlockRows)
      blocks.push_back({active.size(), start[e] + at, std::min(kBlockRows, count - at)});
    if (count > 0) active.push_back({e, start[e], count});
    start[e + 1] += start[e];
  }
  tokens.resize(start[experts]);
  weights.resize(start[experts]);
  slots.resize(start[experts]);
  for (size_t i = 0; i < pairs; ++i) {
    if (expert_ids[i] < 0) continue;
    const size_t at = start[static_cast<size_t>(expert_ids[i])]++;
    tokens[at] = static_cast<int32_t>(i / top_k);
    weights[at] = routing[i];
    slots[at] = i;
  }
}

}  // namespace kt
