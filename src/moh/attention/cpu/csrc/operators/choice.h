// Which routed heads of a token are active, by their scores: for the operators that route by themselves.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace moh {

// Equally many heads in each of `parts` parts of the routed ones, in units of `together` neighbours; or, whatever their
// number, those whose score is above `threshold`.
struct Choice {
  std::vector<int64_t> shared, routed;  // heads, rising
  int64_t active, parts, together;
  std::optional<float> threshold;

  Choice(int64_t heads, c10::IntArrayRef shared_, int64_t active_, int64_t parts_, int64_t together_,
         std::optional<double> threshold_)
      : active(active_), parts(parts_), together(together_), threshold(threshold_) {
    std::vector<char> is_shared(heads, 0);
    for (const int64_t h : shared_) {
      TORCH_CHECK_VALUE(h >= 0 && h < heads, "shared heads must be between 0 and ", heads - 1, ", got ", h);
      is_shared[h] = 1;
    }
    for (int64_t h = 0; h < heads; ++h) (is_shared[h] ? shared : routed).push_back(h);
    TORCH_CHECK_VALUE(active >= 0 && active <= num_routed(), "active must be between 0 and ", num_routed(), ", got ",
                      active);
    TORCH_CHECK_VALUE(parts > 0 && together > 0 && num_routed() % (parts * together) == 0 &&
                          active % (parts * together) == 0,
                      "active and all routed heads must be multiples of parts * together = ", parts * together,
                      ", got ", active, " and ", num_routed());
  }
  int64_t num_shared() const { return static_cast<int64_t>(shared.size()); }
  int64_t num_routed() const { return static_cast<int64_t>(routed.size()); }
  bool needs_scores() const { return active != 0 && active != num_routed(); }
};

// Makes one token's choice after the other, in the same memory.
class Chooser {
 public:
  explicit Chooser(const Choice& choice)
      : choice_(choice), order_(choice.num_routed()), sums_(choice.num_routed()), active_(choice.num_routed()) {}

  // Whether each routed head is active, by their scores; of equal ones the first wins.
  const char* operator()(const float* scores) {
    const int64_t heads = choice_.num_routed();
    if (!choice_.needs_scores()) {
      std::fill(active_.begin(), active_.end(), choice_.active != 0);
      return active_.data();
    }
    if (choice_.threshold.has_value()) {
      for (int64_t i = 0; i < heads; ++i) active_[i] = !(scores[i] <= *choice_.threshold);  // NaN counts as above.
      return active_.data();
    }
    std::fill(active_.begin(), active_.end(), 0);
    const int64_t together = choice_.together, least = choice_.parts * together;
    const int64_t units = heads / least, chosen = choice_.active / least;  // These are numbers per part.
    for (int64_t part = 0; part < choice_.parts; ++part) {
      const int64_t first = part * units * together;
      for (int64_t u = 0; u < units; ++u) {
        order_[u] = u, sums_[u] = 0.0f;
        for (int64_t i = 0; i < together; ++i) sums_[u] += scores[first + u * together + i];
      }
      const auto before = [&](int64_t a, int64_t b) {
        return ranks_above(sums_[a], sums_[b]) || (a < b && !ranks_above(sums_[b], sums_[a]));
      };
      std::partial_sort(order_.begin(), order_.begin() + chosen, order_.begin() + units, before);
      for (int64_t u = 0; u < chosen; ++u) std::fill_n(active_.begin() + first + order_[u] * together, together, 1);
    }
    return active_.data();
  }

 private:
  // NaN ranks above all numbers, as in at::topk.
  static bool ranks_above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

  const Choice& choice_;
  std::vector<int64_t> order_;
  std::vector<float> sums_;
  std::vector<char> active_;
};

}  // namespace moh
