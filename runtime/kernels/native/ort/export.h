// Marks the functions that the library exports; everything else is hidden (-fvisibility=hidden).
#pragma once

#if defined(_WIN32)
#define PARD_EXPORT extern "C" __declspec(dllexport)
#else
#define PARD_EXPORT extern "C" __attribute__((visibility("default")))
#endif
