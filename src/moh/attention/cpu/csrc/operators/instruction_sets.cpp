// Which kernels this build has, and which of them are in use.
#include <torch/library.h>

#include <atomic>
#include <string>
#include <vector>

#include "operators/operators.h"

namespace moh {
namespace {

std::atomic<const Kernels*> in_use{nullptr};

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> all;  // The most capable comes first.
#ifdef MOH_AMX
  if (amx_works()) all.push_back(&amx_kernels());
#endif
#ifdef MOH_AVX512_BF16
  all.push_back(&avx512_bf16_kernels());
#endif
#ifdef MOH_AVX512
  all.push_back(&avx512_kernels());
#endif
#ifdef MOH_AVX2
  all.push_back(&avx2_kernels());
#endif
#ifdef MOH_AMX_IMITATED
  all.push_back(&amx_imitated_kernels());
#endif
  all.push_back(&portable_kernels());
  return all;
}

std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.emplace_back(k->name);
  return names;
}

void use(const std::string& name) {
  for (const Kernels* k : available())
    if (name == k->name) {
      in_use = k;
      return;
    }
  TORCH_CHECK_VALUE(false, "instruction set '", name, "' is not in this build");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const most_capable = available().front();
  const Kernels* chosen = in_use;
  return chosen != nullptr ? *chosen : *most_capable;
}

}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def("cpu_instruction_sets() -> str[]", moh::names);
  m.def("cpu_use_instruction_set(str name) -> ()", moh::use);
  m.def("cpu_in_use() -> str", [] { return std::string(moh::kernels().name); });
}
