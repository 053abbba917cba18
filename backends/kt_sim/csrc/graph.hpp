// torch.accelerator.Graph for simulated devices.
#pragma once

namespace kt_sim {

// Once in a process, after torch.utils.rename_privateuse1_backend: torch finds it by that name.
void register_graphs();

}  // namespace kt_sim
