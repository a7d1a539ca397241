// The prototypes that each image's active groups allow.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace dpdiff {

inline std::vector<int64_t> ascending_distinct(const int64_t* first, const int64_t* last) {
  std::vector<int64_t> numbers(first, last);
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers;
}

// Image b's prototypes are rows[begin[b]] up to rows[begin[b + 1]]: group after group, ascending within each.
struct Routes {
  std::vector<int64_t> begin{0}, rows;

  // group (n_prototypes,); active_groups (n_batch, n_active), where what is negative is none.
  Routes(const int64_t* group, int64_t n_prototypes, const int64_t* active_groups, int64_t n_batch, int64_t n_active) {
    std::vector<int64_t> order(n_prototypes);
    for (int64_t i = 0; i < n_prototypes; ++i) order[i] = i;
    if (!std::is_sorted(group, group + n_prototypes)) {
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group[a] < group[b]; });
    }
    for (int64_t b = 0; b < n_batch; ++b, active_groups += n_active) {
      for (const int64_t g : ascending_distinct(active_groups, active_groups + n_active)) {
        if (g < 0) continue;
        auto at = std::lower_bound(order.begin(), order.end(), g, [&](int64_t i, int64_t g) { return group[i] < g; });
        for (; at != order.end() && group[*at] == g; ++at) rows.push_back(*at);
      }
      begin.push_back(rows.size());
    }
  }

  int64_t count(int64_t image) const { return begin[image + 1] - begin[image]; }
};

}  // namespace dpdiff
