// What torch asks of a device type that is not its own.
#pragma once

namespace kt_sim {

// Once in a process, after torch.utils.rename_privateuse1_backend.
void register_hooks();

}  // namespace kt_sim
