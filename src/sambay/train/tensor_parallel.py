"""One model computed by several processes together: which rows and columns each of them holds.

The processes of a tensor group see the same rows of the batch and hold the same residual stream.
Each computes its own heads, channels and classes:

| module          | parameter              | each process holds                              |
| --------------- | ---------------------- | ----------------------------------------------- |
| attention       | q_proj                 | the rows of its query heads                     |
|                 | kv_proj                | the rows of its key heads, and of its values    |
|                 | lambdas, norm weight   | all                                             |
|                 | out_proj               | the columns of its heads; the bias              |
| Mamba           | in_proj                | the rows of its channels, in both halves        |
|                 | conv, dt_bias, A_log, D| its channels                                    |
|                 | x_proj                 | the columns of its channels                     |
|                 | dt_proj                | the rows of its channels                        |
|                 | out_proj               | the columns of its channels                     |
| GMU             | in_proj, out_proj      | the rows, the columns of its channels           |
| MLP             | in_proj                | the rows of its channels, of gates and of values|
|                 | out_proj               | the columns of its channels                     |
| embedding, head | weight                 | the rows of its classes                         |
| norms           | weight, bias           | all                                             |

Published keys, values and memories are those of the own heads and channels, which is what the
layers that read them need.
"""

from __future__ import annotations
