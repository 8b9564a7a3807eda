// Makes the library importable as a Python module. Importing it registers the kernels; it has no content of its own.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#ifndef QZOO_MODULE
#define QZOO_MODULE _C
#endif
#define QZOO_JOIN_(a, b) a##b
#define QZOO_JOIN(a, b) QZOO_JOIN_(a, b)
#define QZOO_TEXT_(a) #a
#define QZOO_TEXT(a) QZOO_TEXT_(a)

PyMODINIT_FUNC QZOO_JOIN(PyInit_, QZOO_MODULE)(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, QZOO_TEXT(QZOO_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
